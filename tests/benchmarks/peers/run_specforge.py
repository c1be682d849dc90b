"""SpecForge: one torch.save file a sequence, FeatureDataLoader, OnlineEagle3Model on stored states."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shape
import torch
from serve import BATCH_SEQUENCES, MAX_LENGTH, Candidate, serve, step_of
from specforge.algorithms.eagle3.providers import algorithm_providers
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.modeling.target.target_head import TargetHead
from specforge.runtime.contracts import TrainBatch
from specforge.runtime.data_plane.feature_dataloader import FeatureDataLoader
from specforge.runtime.data_plane.feature_store import LocalFeatureStore
from specforge.training.strategies.base import Eagle3TrainStrategy
from train_specforge import eagle3_model
from transformers import LlamaConfig

OFFLINE = algorithm_providers().offline_for("text")


DRAFT = shape.LLAMA | {
    "num_hidden_layers": 1,
    "draft_vocab_size": shape.DRAFT_VOCABULARY,
    "pad_token_id": 0,
    "fc_norm": True,
    "norm_output": True,
}


def new_draft(dtype: torch.dtype) -> LlamaForCausalLMEagle3:
    draft = LlamaForCausalLMEagle3(LlamaConfig(**DRAFT), attention_backend="sdpa")
    draft.t2d.copy_(shape.membership())
    draft.d2t.zero_()
    draft.freeze_embedding()
    return draft.to(dtype)


def new_strategy(draft: LlamaForCausalLMEagle3, head: TargetHead) -> Eagle3TrainStrategy:
    model = eagle3_model.OnlineEagle3Model(draft, length=shape.UNROLLED, attention_backend="sdpa")
    return Eagle3TrainStrategy(model, target_head=head)


class SpecForge(Candidate):
    package = "specforge"

    def prepared(self, arrays: dict[str, Any], longest: int) -> dict[str, torch.Tensor]:
        aux, last = (torch.from_numpy(arrays[name]).view(torch.bfloat16) for name in ("aux_hidden", "last_hidden"))
        return OFFLINE.capture_layout.materialize(
            {
                "input_ids": torch.from_numpy(arrays["input_ids"]).long(),
                "loss_mask": torch.from_numpy(arrays["loss_mask"]).long(),
                "aux_hidden_states": aux.flatten(1)[None].contiguous(),
                "last_hidden_states": last[None].contiguous(),
            }
        )

    def add(self, folder: Path, variant: str, first: int, ready: list[dict[str, torch.Tensor]]) -> None:
        """Write what its ``prepare_hidden_states.py`` writes: these keys, by this call."""
        for number, each in enumerate(ready, first):
            torch.save(each, folder / f"data_{number}.ckpt")

    def finish(self, folder: Path, variant: str) -> None:
        pass

    def loader(self, folder: Path, variant: str, workers: int) -> FeatureDataLoader:
        reader = OFFLINE.build_reader(str(folder), run_id="offline", ttt_length=shape.UNROLLED, max_len=MAX_LENGTH)
        refs = reader.read()
        random.Random(0).shuffle(refs)
        return FeatureDataLoader(
            LocalFeatureStore(),
            refs=refs,
            batch_size=BATCH_SEQUENCES,
            collate_fn=OFFLINE.build_collator(),
            per_sample_transform=OFFLINE.build_normalizer(MAX_LENGTH),
            num_workers=workers,
        )

    def tokens_of(self, batch: TrainBatch) -> int:
        return int(batch.tensors["attention_mask"].sum())

    def new_step(self, dtype: str, is_half: bool, way: str) -> Callable[[], None]:
        made = shape.inputs(dtype, is_half)
        with self.target() as target:
            head = TargetHead(str(target))
        head.fc.weight.data.copy_(made.target_head)
        head.freeze_weights()
        draft = new_draft(shape.DTYPES[dtype])
        strategy = new_strategy(draft, head.to(shape.DTYPES[dtype]))
        batch = TrainBatch(
            sample_ids=["0", "1"],
            strategy="eagle3",
            tensors={
                "input_ids": made.input_ids,
                "attention_mask": torch.ones_like(made.input_ids),
                "loss_mask": made.loss_mask,
                "hidden_state": made.aux_hidden,
                "target": made.last_hidden,
            },
            metadata={"target_repr": "hidden_state"},
        )
        return step_of(draft, lambda: strategy.forward_loss(batch).loss)

    def command(self, folder: Path, target: Path, out: Path) -> list[str]:
        draft = folder.with_name(f"{folder.name}-draft.json")
        draft.write_text(json.dumps(DRAFT | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}))
        settings = {
            "model": {"target_model_path": str(target), "draft_model_config": str(draft)},
            "data": {
                "hidden_states_path": str(folder),
                "max_length": shape.LENGTH,
                "dataloader_num_workers": 0,
                "cache_dir": str(out / "cache"),
            },
            "training": {
                "strategy": "eagle3",
                "batch_size": shape.ROWS,
                "ttt_length": shape.UNROLLED,
                "attention_backend": "sdpa",
                # Sharding wants a GPU.
                "fsdp_sharding": "NO_SHARD",
            },
            "output_dir": str(out),
        }
        config = folder.with_name(f"{folder.name}-train.json")
        config.write_text(json.dumps(settings))
        return ["train_specforge:main", "train", "--config", str(config)]


if __name__ == "__main__":
    serve(SpecForge())
