"""What is asked of one project, and how: a child process that answers a line of JSON with a line of JSON.

It runs in the project's own environment and lives as long as the comparison, so that all can take turns. What
libraries print goes to stderr.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import shape
import torch
from sequences import small_sequence

BATCH_SEQUENCES = 4
SMALL_BLOCK = 200
"""Small sequences that are made ready at a time."""
MAX_LENGTH = 2048


def block_sequence(workspace: str, number: int) -> dict[str, Any]:
    """Read a sequence of the block that is written now."""
    return {path.stem: np.load(path) for path in (Path(workspace) / "block" / str(number)).iterdir()}


class Stopwatch:
    """Measures a block: seconds, and those that the processor was at it, which other programs do not add to."""

    def __enter__(self) -> Self:
        self._seconds, self._cpu_s = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, cpu_s = time.perf_counter() - self._seconds, time.process_time() - self._cpu_s
        self.found = {"seconds": seconds, "cpu_s": cpu_s}


class Candidate(ABC):
    """One project: its writer, its reader, its step, its training command."""

    package: str
    """As the index names it."""

    def __init__(self) -> None:
        torch.set_num_threads(shape.THREADS)
        self._steps: dict[tuple[str, bool, str], Callable[[], None]] = {}
        self._loaders: dict[tuple[str, int], Any] = {}

    def about(self) -> dict[str, str]:
        return {
            "package": self.package,
            "version": importlib.metadata.version(self.package),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        }

    # Writing.

    def write(self, workspace: str, variant: str, first: int, stop: int, is_last: bool) -> dict[str, float]:
        """Write a block of sequences that lie ready; return seconds and processor seconds of writing alone."""
        folder = Path(workspace) / f"{self.package}-{variant}"
        folder.mkdir(exist_ok=True)
        ready = [self.prepared(block_sequence(workspace, number), MAX_LENGTH) for number in range(first, stop)]
        with Stopwatch() as watch:
            self.add(folder, variant, first, ready)
            if is_last:
                self.finish(folder, variant)
        return watch.found

    def write_small(self, folder: str, count: int) -> None:
        """Write the small sequences, which the first step is taken on."""
        path = Path(folder)
        path.mkdir()
        for first in range(0, count, SMALL_BLOCK):
            numbers = range(first, min(first + SMALL_BLOCK, count))
            self.add(path, "small", first, [self.prepared(small_sequence(number), shape.LENGTH) for number in numbers])
        self.finish(path, "small")

    @abstractmethod
    def prepared(self, arrays: dict[str, Any], longest: int) -> Any:
        """Return a sequence as its writer is given it."""

    @abstractmethod
    def add(self, folder: Path, variant: str, first: int, ready: list[Any]) -> None: ...

    @abstractmethod
    def finish(self, folder: Path, variant: str) -> None: ...

    def error(self, variant: str) -> float:
        """Return the relative L2 error of the worst array."""
        return 0.0

    # Reading.

    def read(self, workspace: str, variant: str, workers: int) -> dict[str, float]:
        """Read everything once in random order, to batches; return the same, and the tokens seen."""
        key = (variant, workers)
        if key not in self._loaders:
            self._loaders[key] = self.loader(Path(workspace) / f"{self.package}-{variant}", variant, workers)
            if workers:
                # Processes that stay have started by the second time.
                self._epoch(self._loaders[key])
        with Stopwatch() as watch:
            tokens = self._epoch(self._loaders[key])
        return watch.found | {"tokens": tokens}

    def first_batch(self, workspace: str, variant: str) -> dict[str, float]:
        """Go from a finished store to its first batch, which a step could begin with; return seconds."""
        with Stopwatch() as watch:
            batches = iter(self.loader(Path(workspace) / f"{self.package}-{variant}", variant, 0))
            next(batches)
        return watch.found

    def forget(self, variant: str, workers: int) -> None:
        """End the processes of a loader."""
        self._loaders.pop((variant, workers), None)

    def _epoch(self, loader: Any) -> int:
        return sum(self.tokens_of(batch) for batch in loader)

    def loader(self, folder: Path, variant: str, workers: int) -> Any:
        raise NotImplementedError

    def tokens_of(self, batch: Any) -> int:
        raise NotImplementedError

    # Training.

    def step(self, dtype: str, is_half: bool, way: str) -> dict[str, float]:
        """Take a step without the optimizer; return seconds and processor seconds."""
        key = (dtype, is_half, way)
        if key not in self._steps:
            self._steps[key] = self.new_step(dtype, is_half, way)
        with Stopwatch() as watch:
            self._steps[key]()
        return watch.found

    @abstractmethod
    def new_step(self, dtype: str, is_half: bool, way: str) -> Callable[[], None]: ...

    def training_command(self, folder: str, target: str, out: str) -> list[str]:
        """Return what trains from a finished store of small sequences, as ``first_step.py`` is told it.

        ``out`` is where it may write, and does not exist when the command is run.
        """
        return self.command(Path(folder), Path(target), Path(out))

    @abstractmethod
    def command(self, folder: Path, target: Path, out: Path) -> list[str]: ...

    def write_target(self, folder: str) -> None:
        shape.make_target(Path(folder))

    @contextmanager
    def target(self) -> Iterator[Path]:
        """Give a checkpoint of the target, for as long as the block lasts."""
        with tempfile.TemporaryDirectory() as folder:
            shape.make_target(Path(folder))
            yield Path(folder)


def step_of(draft: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return what takes a step without the optimizer."""

    def step() -> None:
        draft.zero_grad()
        loss().backward()

    return step


def serve(candidate: Candidate) -> None:
    """Answer until the other end closes. Called last, so that the first line says that all is imported."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    calls: dict[str, Callable[..., Any]] = {
        "about": candidate.about,
        "write": candidate.write,
        "write_small": candidate.write_small,
        "write_target": candidate.write_target,
        "error": candidate.error,
        "read": candidate.read,
        "first_batch": candidate.first_batch,
        "forget": candidate.forget,
        "step": candidate.step,
        "training_command": candidate.training_command,
    }
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(calls[request["call"]](**request["arguments"])), file=answers)
