"""NeMo Automodel: shards of padded sequences with the target's top-k, its cached data set, Eagle3TrainerModule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shape
import torch
from nemo_automodel.components.datasets.llm.eagle3_cache import (
    build_cached_eagle3_dataloader,
    compress_target_probs,
    write_manifest,
    write_shard,
    write_target_embeddings,
)
from nemo_automodel.components.speculative.eagle.core import Eagle3TrainerModule, _compute_target_distribution
from nemo_automodel.components.speculative.eagle.draft_llama import LlamaEagle3DraftModel
from serve import BATCH_SEQUENCES, Candidate, serve, step_of
from torch.nn import functional as F
from transformers import LlamaConfig


def new_trainer(dtype: torch.dtype) -> Eagle3TrainerModule:
    """Build its draft and what unrolls it; its attention on a CPU is the eager one."""
    config = LlamaConfig(
        **shape.LLAMA,
        num_hidden_layers=1,
        draft_vocab_size=shape.DRAFT_VOCABULARY,
        target_hidden_size=shape.HIDDEN,
        num_aux_hidden_states=len(shape.BOUNDARIES),
        fc_norm=True,
        norm_output=True,
        pad_token_id=0,
        attn_implementation="eager",
    )
    draft = LlamaEagle3DraftModel(config).to(dtype)
    draft.set_vocab_mapping(shape.draft_ids())
    draft.freeze_embeddings()
    return Eagle3TrainerModule(
        draft,
        selected_token_ids=shape.draft_ids(),
        selected_token_mask=shape.membership(),
        ttt_steps=shape.UNROLLED,
    )


class Automodel(Candidate):
    package = "nemo-automodel"

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[Path, list[int]] = {}

    def prepared(self, arrays: dict[str, Any], longest: int) -> dict[str, torch.Tensor]:
        """Return a row of a shard, padded: what its ``precompute_eagle3`` keeps of a target's batch."""
        aux = torch.from_numpy(arrays["aux_hidden"]).view(torch.bfloat16).flatten(1)
        ids = torch.from_numpy(arrays["topk_ids"].astype("int64")) % shape.DRAFT_VOCABULARY
        probabilities = torch.zeros(len(ids), shape.DRAFT_VOCABULARY)
        probabilities.scatter_(1, ids, torch.from_numpy(arrays["topk_logprob"]).float().exp())
        values, indices = compress_target_probs(probabilities, ids.shape[1])
        mask = torch.from_numpy(arrays["loss_mask"]).long()
        row = {
            "input_ids": torch.from_numpy(arrays["input_ids"]).long(),
            "attention_mask": torch.ones_like(mask),
            "loss_mask": mask,
            "aux_hidden_states": aux,
            "position_mask": mask.bool()[:, None],
            "target_probs_values": values.bfloat16(),
            "target_probs_indices": indices,
        }
        beyond = longest - len(mask)
        return {name: F.pad(each, (0, 0) * (each.ndim - 1) + (0, beyond)) for name, each in row.items()}

    def add(self, folder: Path, variant: str, first: int, ready: list[dict[str, torch.Tensor]]) -> None:
        sizes = self._sizes.setdefault(folder, [])
        fields = {name: torch.stack([each[name] for each in ready]) for name in ready[0]}
        if variant == "small":
            # On a CPU it trains in float32, and takes no other.
            fields["aux_hidden_states"] = fields["aux_hidden_states"].float()
        write_shard(str(folder), len(sizes), fields)
        sizes.append(len(ready))
        self._top_k = ready[0]["target_probs_values"].shape[-1]
        self._aux_width = ready[0]["aux_hidden_states"].shape[-1]

    def finish(self, folder: Path, variant: str) -> None:
        sizes = self._sizes.pop(folder)
        manifest = {
            "draft_vocab_size": shape.DRAFT_VOCABULARY,
            "num_samples": sum(sizes),
            "shard_size": sizes[0],
            "target_probs_topk": self._top_k,
            "selected_token_ids": shape.draft_ids().tolist(),
            "target_vocab_size": shape.VOCABULARY,
            "aux_hidden_dim": self._aux_width,
        }
        write_manifest(str(folder), manifest)
        if variant == "small":
            write_target_embeddings(str(folder), torch.randn(shape.VOCABULARY, shape.HIDDEN))

    def loader(self, folder: Path, variant: str, workers: int) -> Any:
        return build_cached_eagle3_dataloader(
            cache_dir=str(folder), batch_size=BATCH_SEQUENCES, shuffle=True, num_workers=workers
        )

    def tokens_of(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batch["attention_mask"].sum())

    def new_step(self, dtype: str, is_half: bool, way: str) -> Callable[[], None]:
        made = shape.inputs(dtype, is_half)
        trainer = new_trainer(shape.DTYPES[dtype])
        probabilities, positions = _compute_target_distribution(
            made.last_hidden.float() @ made.target_head.T, shape.draft_ids(), shape.membership(), made.loss_mask
        )
        batch = {
            "input_ids": made.input_ids,
            "attention_mask": torch.ones_like(made.input_ids),
            "loss_mask": made.loss_mask,
            "aux_hidden_states": made.aux_hidden,
            "target_probs": probabilities.to(shape.DTYPES[dtype]),
            "position_mask": positions,
        }
        return step_of(trainer, lambda: trainer(**batch).loss)

    def command(self, folder: Path, target: Path, out: Path) -> list[str]:
        """Its recipe: the command before it asks for a GPU."""
        settings = {
            "dist_env": {"backend": "gloo"},
            "recipe_args": {
                "target_model_name_or_path": str(target),
                "cached_target_path": str(folder),
                "micro_batch_size": shape.ROWS,
                "ttt_steps": shape.UNROLLED,
                "num_epochs": 1,
                "fc_norm": True,
                "norm_output": True,
                "output_dir": str(out),
            },
            "optimizer": {"lr": 1e-4},
        }
        config = folder.with_name(f"{folder.name}-train.yaml")
        # JSON is YAML.
        config.write_text(json.dumps(settings))
        return ["nemo_automodel.recipes.llm.train_eagle3:main", "--config", str(config)]


if __name__ == "__main__":
    serve(Automodel())
