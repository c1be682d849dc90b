"""SpecForge: one torch.save file a sequence, FeatureDataLoader, OnlineEagle3Model on stored states."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shape
import specforge.algorithms.eagle3.model as eagle3_model
import torch
from serve import BATCH_SEQUENCES, MAX_LENGTH, Candidate, optimize, serve, step_of
from specforge.algorithms.eagle3.providers import algorithm_providers
from specforge.core.loss import _compute_loss
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.modeling.target.target_head import TargetHead
from specforge.runtime.contracts import TrainBatch
from specforge.runtime.data_plane.feature_dataloader import FeatureDataLoader
from specforge.runtime.data_plane.feature_store import LocalFeatureStore
from specforge.training.strategies.base import Eagle3TrainStrategy
from transformers import LlamaConfig

OFFLINE = algorithm_providers().offline_for("text")


class PlainLoss:
    """Its own loss without Triton, in the place of the one with."""

    apply = staticmethod(_compute_loss)


eagle3_model.LogSoftmaxLoss = PlainLoss


def new_draft(dtype: torch.dtype) -> LlamaForCausalLMEagle3:
    config = LlamaConfig(
        **shape.LLAMA,
        num_hidden_layers=1,
        draft_vocab_size=shape.DRAFT_VOCABULARY,
        pad_token_id=0,
        fc_norm=True,
        norm_output=True,
    )
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    draft.t2d.copy_(shape.membership())
    draft.d2t.zero_()
    draft.freeze_embedding()
    return draft.to(dtype)


def new_strategy(draft: LlamaForCausalLMEagle3, head: TargetHead) -> Eagle3TrainStrategy:
    model = eagle3_model.OnlineEagle3Model(draft, length=shape.UNROLLED, attention_backend="sdpa")
    return Eagle3TrainStrategy(model, target_head=head)


class SpecForge(Candidate):
    package = "specforge"
    # Of training on stored states; most it imports as it gets there.
    command = (
        "specforge.cli",
        "accelerate.utils",
        "specforge.application",
        "specforge.data.preprocessing",
        "specforge.distributed",
        "specforge.launch",
        "specforge.modeling.draft.registry",
        "specforge.modeling.target.target_utils",
        "specforge.optimizer",
        "specforge.runtime.data_plane.offline_reader",
        "specforge.training",
        "specforge.training.assembly",
        "specforge.training.model_loading",
        "specforge.training.profiling",
        "specforge.training.tracking",
        "specforge.training.vocab_mapping",
        "specforge.utils",
    )

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

    def loader(
        self, folder: Path, variant: str, workers: int, rows: int = BATCH_SEQUENCES, longest: int = MAX_LENGTH
    ) -> FeatureDataLoader:
        reader = OFFLINE.build_reader(str(folder), run_id="offline", ttt_length=shape.UNROLLED, max_len=longest)
        refs = reader.read()
        random.Random(0).shuffle(refs)
        return FeatureDataLoader(
            LocalFeatureStore(),
            refs=refs,
            batch_size=rows,
            collate_fn=OFFLINE.build_collator(),
            per_sample_transform=OFFLINE.build_normalizer(longest),
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

    def first_step(self, folder: Path, target: Path) -> None:
        loader = self.loader(folder, "small", 0, shape.ROWS, shape.LENGTH)
        draft = new_draft(torch.bfloat16)
        draft.load_embedding(str(target))
        strategy = new_strategy(draft, TargetHead.from_pretrained(str(target)))
        optimize(draft, strategy.forward_loss(next(iter(loader))).loss)


if __name__ == "__main__":
    serve(SpecForge())
