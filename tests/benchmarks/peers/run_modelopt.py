"""ModelOpt: one torch.save file a sequence, its offline data set and collator, a draft on a base without layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import shape
import torch
from modelopt.torch.speculative.eagle.utils import EagleOfflineDataCollator
from modelopt.torch.speculative.plugins.modeling_fakebase import FakeBaseConfig, FakeBaseModel
from serve import BATCH_SEQUENCES, MAX_LENGTH, Candidate, serve, step_of
from torch.utils.data import DataLoader
from train_modelopt import converted, dataset


class ModelOpt(Candidate):
    package = "nvidia-modelopt"

    def prepared(self, arrays: dict[str, Any], longest: int) -> dict[str, torch.Tensor]:
        aux, last = (torch.from_numpy(arrays[name]).view(torch.bfloat16) for name in ("aux_hidden", "last_hidden"))
        return {
            "input_ids": torch.from_numpy(arrays["input_ids"]).long(),
            "hidden_states": last.contiguous(),
            "aux_hidden_states": aux.flatten(1).contiguous(),
            "loss_mask": torch.from_numpy(arrays["loss_mask"]).long(),
        }

    def add(self, folder: Path, variant: str, first: int, ready: list[dict[str, torch.Tensor]]) -> None:
        """Write what its ``compute_hidden_states`` scripts write: these keys, by this call."""
        for number, each in enumerate(ready, first):
            torch.save(each, folder / f"{number}.pt")

    def finish(self, folder: Path, variant: str) -> None:
        pass

    def loader(self, folder: Path, variant: str, workers: int) -> DataLoader[Any]:
        """Build what the transformers Trainer builds from its data set and its collator."""
        collator = EagleOfflineDataCollator(train_len=MAX_LENGTH)
        return DataLoader(
            dataset(folder), BATCH_SEQUENCES, shuffle=True, num_workers=workers, collate_fn=collator, drop_last=False
        )

    def tokens_of(self, batch: dict[str, Any]) -> int:
        return int(batch["attention_mask"].sum())

    def new_step(self, dtype: str, is_half: bool, way: str) -> Callable[[], None]:
        made = shape.inputs(dtype, is_half)
        base = FakeBaseModel(FakeBaseConfig(**shape.LLAMA, num_hidden_layers=shape.LAYERS, dtype=shape.DTYPES[dtype]))
        base.lm_head.weight.data.copy_(made.target_head)
        model = converted(base, way == "compiled")
        batch = {
            "input_ids": made.input_ids,
            "attention_mask": torch.ones_like(made.input_ids),
            "loss_mask": made.loss_mask,
            "base_model_outputs": {
                "base_model_hidden_states": made.last_hidden,
                "aux_hidden_states": made.aux_hidden,
            },
        }
        return step_of(model, lambda: model(**batch).loss)

    def command(self, folder: Path, target: Path, out: Path) -> list[str]:
        return ["train_modelopt:main", str(folder), str(target), str(out)]


if __name__ == "__main__":
    serve(ModelOpt())
