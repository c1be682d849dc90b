"""Outputs on their way to the store: a bounded queue, and a thread that writes.

The engine goes on while the thread compresses and writes. Only when the queue is
full does it wait, and how long is counted.
"""

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from ...storage.schema import Reject
from ...storage.writer import FeatureWriter
from ..data.samples import Sample
from .outputs import NonfiniteOutputsError, Outputs


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of samples since the last time it was asked for."""

    committed: list[bytes] = field(default_factory=list)
    """Ids of sequences that are now in the store."""
    tokens: int = 0
    """Of these sequences."""
    rejects: list[Reject] = field(default_factory=list)
    """Samples that the target gave nothing usable for."""
    waited_s: float = 0.0
    """Time the engine stood still because the writer was behind."""

    def add(self, other: "Outcome") -> None:
        """Take in a later outcome."""
        self.committed += other.committed
        self.tokens += other.tokens
        self.rejects += other.rejects
        self.waited_s += other.waited_s


class Ready(Protocol):
    """Outputs that may still be on their way to the CPU."""

    @property
    def nbytes(self) -> int: ...

    def wait(self) -> Outputs:
        """Return the outputs on the CPU, once they are there."""
        ...


@dataclass(frozen=True, slots=True)
class OnCpu:
    """Outputs that are there already."""

    outputs: Outputs

    @property
    def nbytes(self) -> int:
        return self.outputs.nbytes

    def wait(self) -> Outputs:
        return self.outputs


class Sink:
    """Writes in a thread of its own."""

    def __init__(self, writer: FeatureWriter, *, queue_bytes: int) -> None:
        """``queue_bytes`` bounds the outputs that wait, though a single larger one is taken alone."""
        self._writer = writer
        self._queue_bytes = queue_bytes
        self._queued_bytes = 0
        self._room = threading.Condition()
        self._queue: queue.SimpleQueue[tuple[Sample, Ready] | Reject | None] = queue.SimpleQueue()
        self._outcome = Outcome()
        self._noted_tokens = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="specx-writer", daemon=True)
        self._thread.start()

    def put(self, sample: Sample, ready: Ready) -> None:
        """Queue a sample's outputs, waiting while the queue is full; raise what stopped the writer."""
        with self._room:
            started = time.monotonic()
            self._room.wait_for(lambda: self._error or not self._queued_bytes or self._has_room(ready))
            self._outcome.waited_s += time.monotonic() - started
            self._raise_error()
            self._queued_bytes += ready.nbytes
        self._queue.put((sample, ready))

    def reject(self, reject: Reject) -> None:
        """Note a row that gave no sequence in the record of the unit in progress."""
        self._queue.put(reject)

    def take(self) -> Outcome:
        """Return what happened since the last call; raise what stopped the writer."""
        with self._room:
            self._raise_error()
            outcome, self._outcome = self._outcome, Outcome()
        return outcome

    def finish(self) -> None:
        """Write and commit all that was put, and stop the thread; raise what stopped the writer."""
        self._stop()
        self._raise_error()
        self._writer.commit()
        self._note_commits()

    def close(self) -> None:
        """Stop the thread and drop what ``finish`` did not commit."""
        self._stop()
        self._writer.discard()

    def _has_room(self, ready: Ready) -> bool:
        return self._queued_bytes + ready.nbytes <= self._queue_bytes

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, Reject):
                    self._writer.reject(item)
                else:
                    self._write(*item)
        except BaseException as error:
            # It is raised where the engine next looks.
            with self._room:
                self._error = error
                self._room.notify_all()

    def _write(self, sample: Sample, ready: Ready) -> None:
        nbytes = ready.nbytes
        origin = sample.origin
        try:
            self._writer.add(ready.wait().features(sample), origin)
        except NonfiniteOutputsError as error:
            reject = Reject(source=origin.source, row=origin.row, reason="not_finite", detail=str(error))
            self._writer.reject(reject)
            with self._room:
                self._outcome.rejects.append(reject)
        self._note_commits()
        with self._room:
            self._queued_bytes -= nbytes
            self._room.notify_all()

    def _note_commits(self) -> None:
        with self._room:
            self._outcome.committed += self._writer.take_committed()
            self._outcome.tokens += self._writer.committed_tokens - self._noted_tokens
            self._noted_tokens = self._writer.committed_tokens
