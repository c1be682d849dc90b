"""specx, in the project's own environment."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_wait
import shape
import step
import store
from serve import BATCH_SEQUENCES, MAX_LENGTH, Candidate, serve

from specx.storage.ops.info import summary
from specx.storage.reader import FeatureReader
from specx.storage.schema import Origin, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter
from specx.train.data.corpus import Corpus
from specx.train.data.packing import BatchPlan, grouped, shuffled
from specx.train.data.pinned_buffers import Buffers
from specx.train.data.prefetch import BatchLoader


class Epochs:
    """A loader that may be gone through again, each time in another order, as the epochs of a run are."""

    def __init__(self, folder: Path) -> None:
        opened = FeatureStore.open(folder)
        self._corpus = Corpus([FeatureReader(opened)], opened.info.boundaries)
        self._buffers = Buffers()
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:
        order = shuffled(self._corpus.unit, None, seed=0, epoch=self._epoch)
        self._epoch += 1
        groups = grouped(self._corpus.length, BATCH_SEQUENCES * MAX_LENGTH, order)
        plans = [BatchPlan(group) for group in groups]
        return iter(BatchLoader(self._corpus, plans, self._corpus.length.tolist(), buffers=self._buffers))


class Ours(Candidate):
    package = "specx"

    def __init__(self) -> None:
        super().__init__()
        self._writers: dict[Path, FeatureWriter] = {}
        self._errors: dict[str, float] = {}

    def prepared(self, arrays: dict[str, Any], longest: int) -> SequenceFeatures:
        return SequenceFeatures(**arrays)

    def add(self, folder: Path, variant: str, first: int, ready: list[SequenceFeatures]) -> None:
        if folder not in self._writers:
            opened = store.new_store(folder, variant)
            self._writers[folder] = FeatureWriter(opened, tokens_per_part=store.TOKENS_PER_PART)
        for number, features in enumerate(ready, first):
            self._writers[folder].add(features, Origin(source="made-up", row=number))

    def finish(self, folder: Path, variant: str) -> None:
        self._writers.pop(folder).commit()
        found = summary(FeatureStore.open(folder))["quantization_error"]
        self._errors[variant] = max(found.values(), default=0.0)

    def write_small(self, folder: str, count: int) -> None:
        data_wait.make_store(folder, count)

    def error(self, variant: str) -> float:
        return self._errors[variant]

    def loader(self, folder: Path, variant: str, workers: int) -> Epochs:
        return Epochs(folder)

    def tokens_of(self, batch: Any) -> int:
        return int((batch.documents >= 0).sum())

    def new_step(self, dtype: str, is_half: bool, way: str) -> Callable[[], None]:
        if way == "floor":
            return step.floor(shape.DTYPES[dtype])
        case = step.Step(step.Case(dtype=shape.DTYPES[dtype], is_half=is_half))
        return lambda: case.ours(with_metrics=way == "metrics")

    def command(self, folder: Path, target: Path, out: Path) -> list[str]:
        config = folder.with_name(f"{folder.name}-train.yaml")
        # JSON is YAML.
        config.write_text(json.dumps(data_wait.settings(str(folder), out, 50) | {"precision": "bf16-mixed"}))
        return ["specx.cli:main", "train", "--config", str(config)]


if __name__ == "__main__":
    serve(Ours())
