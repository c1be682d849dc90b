"""Batches, read by one thread while the step before trains.

Worker processes lose more to copies than they gain, and nothing may fork once a
store was read; so it is a thread, and the batches are built in place.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from .batch import Batch, read_batch
from .corpus import Corpus
from .packing import BatchPlan
from .pinned_buffers import Buffers

_READY_BATCHES = 2
BATCHES_IN_MEMORY = _READY_BATCHES + 2
"""Ready ones, the one that is read, and the one that is trained on."""
_STAGED_BATCHES = 64
"""Batches whose parts are fetched ahead, where they are not on a local disk."""
_STAGING_THREADS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What this process adds to an optimizer step that has more than one batch.

    The loss is a mean over the labels of the whole step, so they are counted before its first batch is trained on.
    """

    batches: int
    count_labels: Callable[[Batch], torch.Tensor]
    """Counts the labels (K,) of a batch of which only masks and argmax were read."""


class BatchLoader:
    """Iterates over planned batches, from where a checkpoint left off.

    ``wait_s`` is how long the consumer has waited for them so far.
    """

    def __init__(
        self,
        corpus: Corpus,
        plans: Sequence[BatchPlan],
        lengths: Sequence[int],
        *,
        window: Window | None = None,
        buffers: Buffers | None = None,
        draw_anchors: Callable[[Batch], torch.Tensor] | None = None,
    ) -> None:
        """``lengths`` says how many tokens of each sequence are read; with a window batches have ``window_labels``.

        ``draw_anchors`` gives each batch its anchors, once, here in the reader.
        With ``buffers`` the memory of a batch is used again once nothing refers to the batch.
        """
        self._corpus = corpus
        self._plans = plans
        self._lengths = lengths
        self._window = window
        self._buffers = buffers
        self._draw_anchors = draw_anchors
        self._start = 0
        self._next = 0
        self.wait_s = 0.0

    def __len__(self) -> int:
        """Count all planned batches, those already trained on too, as Lightning does on resume."""
        return len(self._plans)

    def __iter__(self) -> Iterator[Batch]:
        # A checkpoint's place holds for one pass; the next begins anew.
        self._next, self._start = self._start, 0
        ready: queue.Queue[Batch | BaseException] = queue.Queue(_READY_BATCHES)
        stopped = threading.Event()
        thread = threading.Thread(
            target=self._produce, args=(self._next, ready, stopped), name="batch reader", daemon=True
        )
        thread.start()
        try:
            while self._next < len(self._plans):
                asked = time.monotonic()
                batch = ready.get()
                self.wait_s += time.monotonic() - asked
                if isinstance(batch, BaseException):
                    raise batch
                self._next += 1
                yield batch
        finally:
            stopped.set()
            while thread.is_alive():
                # The thread may be waiting for room.
                _drain(ready)
                thread.join(timeout=0.01)

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next batch; Lightning puts it into the checkpoint."""
        return {"next_batch": self._next}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from a checkpoint."""
        self._start = state_dict["next_batch"]

    def _produce(self, first: int, ready: "queue.Queue[Batch | BaseException]", stopped: threading.Event) -> None:
        staged = ThreadPoolExecutor(_STAGING_THREADS, thread_name_prefix="part staging")
        labels: torch.Tensor | None = None
        try:
            # What goes wrong here goes wrong again where the batch is read.
            ahead = iter(range(first, len(self._plans)) if self._corpus.is_remote else ())
            for later in itertools.islice(ahead, _STAGED_BATCHES):
                staged.submit(self._corpus.stage, self._plans[later].sequences)
            for number in range(first, len(self._plans)):
                if stopped.is_set():
                    return
                for later in itertools.islice(ahead, 1):
                    staged.submit(self._corpus.stage, self._plans[later].sequences)
                if self._window is not None and number % self._window.batches == 0:
                    labels = self._labels(self._window, number)
                plan = self._plans[number]
                batch = read_batch(
                    self._corpus, plan, self._lengths, buffers=self._buffers, draw_anchors=self._draw_anchors
                )
                ready.put(replace(batch, window_labels=labels))
                # What waits in the queue, and no more, is held.
                del batch
        except BaseException as error:  # raised again where the batch is asked for
            ready.put(error)
        finally:
            staged.shutdown(cancel_futures=True)

    def _labels(self, window: Window, first: int) -> torch.Tensor:
        """Count the labels (K,) of the batches that this process adds to a step, of which ``first`` is the first."""
        plans = self._plans[first : first + window.batches]
        batches = (
            read_batch(self._corpus, plan, self._lengths, labels_only=True, draw_anchors=self._draw_anchors)
            for plan in plans
        )
        return torch.stack([window.count_labels(batch) for batch in batches]).sum(0)


def _drain(ready: "queue.Queue[Batch | BaseException]") -> None:
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return
