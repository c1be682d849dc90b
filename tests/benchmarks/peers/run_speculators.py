"""speculators: one safetensors file a sequence, a packed DataLoader, Eagle3DraftModel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shape
import torch
from datasets import Dataset
from hs_connectors import FileTransfer, FP8Transfer
from hs_connectors.fp8_utils import SCALES_KEY, dequantize_fp8_tensor, quantize_tensor_to_fp8
from safetensors.torch import save_file
from sequences import H
from serve import BATCH_SEQUENCES, MAX_LENGTH, Candidate, block_sequence, serve, step_of
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.data import ArrowDataset
from speculators.train.dataloader import _setup_dataloader
from transformers import LlamaConfig

TRAIN = {
    "ttt_steps": shape.UNROLLED,
    "ttt_step_loss_decay": 0.8,
    # The fused loss is for CUDA.
    "loss_config": resolve_loss_config("kl_div", "eager"),
}


def new_model(target: Path) -> Eagle3DraftModel:
    """Build a draft as its training does; attention by torch's kernel, which is the fastest that has a CPU backward."""
    return Eagle3DraftModel.from_training_args(
        LlamaConfig(**shape.LLAMA, num_hidden_layers=1),
        t2d=shape.membership(),
        d2t=torch.zeros(shape.DRAFT_VOCABULARY, dtype=torch.int64),
        verifier_name_or_path=str(target),
        target_layer_ids=list(shape.BOUNDARIES),
        draft_vocab_size=shape.DRAFT_VOCABULARY,
        norm_before_residual=False,
        fc_norm=True,
        norm_output=True,
        ttt_steps=shape.UNROLLED,
        draft_attn_impl="sdpa",
    )


def loss_of(model: Eagle3DraftModel, batch: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Return the loss as the trainer has it computed: weights in float32, under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, loss, _ = model(**batch, **TRAIN)
    return loss


class Speculators(Candidate):
    package = "speculators"

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[Path, list[dict[str, Any]]] = {}
        self._squares = torch.zeros(2, 2, dtype=torch.float64)

    def prepared(self, arrays: dict[str, Any], longest: int) -> dict[str, torch.Tensor]:
        aux, last = (torch.from_numpy(arrays[name]).view(torch.bfloat16) for name in ("aux_hidden", "last_hidden"))
        return {
            "hidden_states": torch.cat((aux, last[:, None]), dim=1),
            "token_ids": torch.from_numpy(arrays["input_ids"]).long(),
            "loss_mask": torch.from_numpy(arrays["loss_mask"]),
        }

    def add(self, folder: Path, variant: str, first: int, ready: list[dict[str, torch.Tensor]]) -> None:
        """Write what its vLLM connector writes: these keys, by this call."""
        (folder / "hidden_states").mkdir(exist_ok=True)
        rows = self._rows.setdefault(folder, [])
        for number, each in enumerate(ready, first):
            tensors = {"hidden_states": each["hidden_states"], "token_ids": each["token_ids"]}
            if variant == "fp8":
                quantized, scales = quantize_tensor_to_fp8(each["hidden_states"])
                tensors |= {"hidden_states": quantized, SCALES_KEY: scales}
            save_file(tensors, folder / "hidden_states" / f"hs_{number}.safetensors")
            rows.append(
                {
                    "input_ids": each["token_ids"].tolist(),
                    "loss_mask": each["loss_mask"].tolist(),
                    "seq_len": len(each["token_ids"]),
                }
            )

    def write(self, workspace: str, variant: str, first: int, stop: int, is_last: bool) -> dict[str, float]:
        found = super().write(workspace, variant, first, stop, is_last)
        if variant == "fp8":
            # Of one sequence of the block, which is enough for what is the same everywhere.
            self._compare(self.prepared(block_sequence(workspace, first), MAX_LENGTH)["hidden_states"])
        return found

    def _compare(self, states: torch.Tensor) -> None:
        restored = dequantize_fp8_tensor(*quantize_tensor_to_fp8(states))
        for place, chosen in enumerate((slice(0, -1), slice(-1, None))):
            true = states[:, chosen].double()
            self._squares[place, 0] += (restored[:, chosen].double() - true).square().sum()
            self._squares[place, 1] += true.square().sum()

    def error(self, variant: str) -> float:
        return float((self._squares[:, 0] / self._squares[:, 1]).sqrt().max()) if variant == "fp8" else 0.0

    def finish(self, folder: Path, variant: str) -> None:
        rows = Dataset.from_list(self._rows.pop(folder))
        rows.set_format(type="torch")
        rows.save_to_disk(str(folder))

    def loader(self, folder: Path, variant: str, workers: int) -> Any:
        tokens = BATCH_SEQUENCES * MAX_LENGTH
        states = folder / "hidden_states"
        transfer = FP8Transfer(states) if variant == "fp8" else FileTransfer(states)
        dataset = ArrowDataset(max_len=tokens, datapath=str(folder), transfer=transfer, on_missing="raise")
        return _setup_dataloader(dataset, tokens, H, num_workers=workers, preprocess=shift_batch)

    def tokens_of(self, batch: dict[str, Any]) -> int:
        # The first token of each sequence is dropped on the way.
        documents = batch["document_ids"]
        return int((documents >= 0).sum() + documents.max() + 1)

    def new_step(self, dtype: str, is_half: bool, way: str) -> Callable[[], None]:
        made = shape.inputs(dtype, is_half)
        with self.target() as target:
            model = new_model(target)
        documents = torch.arange(shape.ROWS).repeat_interleave(shape.LENGTH)
        batch = {
            "hidden_states": made.aux_hidden.reshape(1, -1, made.aux_hidden.shape[-1]),
            "verifier_last_hidden_states": made.last_hidden.reshape(1, -1, shape.HIDDEN),
            "input_ids": made.input_ids.reshape(1, -1),
            "loss_mask": made.loss_mask.reshape(1, -1).bool(),
            "document_ids": documents[None],
            "position_ids": torch.arange(1, shape.LENGTH + 1).repeat(shape.ROWS)[None],
        }
        return step_of(model, lambda: loss_of(model, batch, shape.DTYPES[dtype]))

    def command(self, folder: Path, target: Path, out: Path) -> list[str]:
        np.save(folder / f"d2t-{shape.DRAFT_VOCABULARY}.npy", np.zeros(shape.DRAFT_VOCABULARY, np.int64))
        np.save(folder / f"t2d-{shape.DRAFT_VOCABULARY}.npy", shape.membership().numpy())
        options = {
            "verifier-name-or-path": target,
            "data-path": folder,
            "draft-vocab-size": shape.DRAFT_VOCABULARY,
            "on-missing": "raise",
            "num-workers": 0,
            "total-seq-len": shape.ROWS * shape.LENGTH,
            "draft-attn-impl": "sdpa",
            "loss-implementation": "eager",
            "optimizer": "adamw",
            "ttt-steps": shape.UNROLLED,
            "save-path": out,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        layers = [str(each) for each in shape.BOUNDARIES]
        norms = ["--fc-norm", "--no-norm-before-fc", "--no-norm-before-residual"]
        return ["train_speculators:app", "train", *words, *norms, "--target-layer-ids", *layers]


if __name__ == "__main__":
    serve(Speculators())
