"""Many engines over one store: samples go to Ray actors, each of which writes its own parts.

What is committed is known from the actors' reports and, of an actor that died, from
the store's commit records. Samples it held and did not commit go to the others, and
a new actor takes its place.
"""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .... import SpecxError
from ....storage.catalog.sequence_id import sequence_id
from ....storage.schema import CommitRecord, DatasetInfo, Reject
from ....storage.store import FeatureStore
from ...config import ExtractConfig
from ...data.samples import Sample
from ...target import Target
from ..base import EngineDiedError, EngineError
from ..sink import Outcome
from .worker import connect

_log = logging.getLogger(__name__)

_RANGE_TOKENS = 16_384
"""Tokens handed to a worker at once, or half a part if that is less."""

_RANGES_AHEAD = 3
"""Ranges a worker has, the one it runs included: it must never wait for the next."""

_DEATHS = 3
"""So many workers may die when they run the same sample, or one after another before they have loaded the target."""

_LOSSES = 10
"""So many may die that only had it: where samples are run in batches, it is not known which one it was."""

_SEEN_WITHIN_S = 90.0
"""A network file system may show a listing this old."""

_SAY_EVERY_S = 60.0

_CLOSE_WITHIN_S = 10.0

_LOOK_AFTER = 4096
"""Samples a worker holds when the commit records are first searched for those that another run has committed."""

_NAMED_ROWS = 5


@dataclass(eq=False, slots=True)
class _Item:
    """A sample until it is committed."""

    sample: Sample
    identifier: bytes
    deaths: int = 0
    """Workers that died when they ran the range it was in."""
    losses: int = 0
    """Workers that had it when they died, for whatever reason; a commit of theirs may show late."""

    @property
    def row(self) -> tuple[str, int]:
        """Source and row, which a row's several answers share."""
        return self.sample.origin.source, self.sample.origin.row


@dataclass(eq=False, slots=True)
class _Worker:
    """What the driver knows of one actor."""

    actor: Any
    name: str = ""
    """Host and process id; empty until it has loaded the target."""
    finishing: bool = False
    seen: bool = False
    """Whether a commit of it was found in the store."""
    ranges: dict[Any, list[_Item]] = field(default_factory=dict)
    """Those not returned, by the reference to the result, in the order they are run."""
    held: dict[bytes, _Item] = field(default_factory=dict)
    """Samples handed to it and not known to be committed."""
    rejects: list[Reject] = field(default_factory=list)
    """Handed to it and not known to be recorded."""
    unclear: list[Reject] = field(default_factory=list)
    """Its own rejects that may be of one or another of the samples it holds."""
    look_at: int = _LOOK_AFTER


class RayEngine:
    """Runs a target in several engines, on one machine or many."""

    def __init__(self, config: ExtractConfig, target: Target, info: DatasetInfo) -> None:
        """Start the workers; they load the target while the first samples are read. Raises EngineError."""
        self._info = info
        self._store = FeatureStore.open(config.store)
        self._first_unit = max(self._store.records, default=-1) + 1
        self._range_tokens = max(1, min(_RANGE_TOKENS, config.tokens_per_part // 2))
        self._gathered: list[_Item] = []
        self._gathered_tokens = 0
        self._queue: deque[list[_Item]] = deque()
        self._rejects: list[Reject] = []
        self._outcome = Outcome()
        self._told: Counter[Reject] = Counter()
        """Rejects of samples that are run again all the same, and will be told again."""
        self._finishing = False
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._calls: dict[Any, _Worker] = {}
        self._cluster = connect(config, target)
        for _ in range(config.workers):
            self._start()

    def add(self, sample: Sample) -> None:
        """Take a sample; wait while every worker has as much as it may have ahead."""
        self._gathered.append(_Item(sample, sequence_id(sample.input_ids)))
        self._gathered_tokens += len(sample.input_ids)
        if self._gathered_tokens < self._range_tokens:
            return
        self._queue_gathered()
        self._progress(timeout_s=0)
        while self._queue:
            self._progress(timeout_s=None)

    def reject(self, reject: Reject) -> None:
        """Take note of a row; it goes to a worker with the next range."""
        self._rejects.append(reject)

    def take(self) -> Outcome:
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    def finish(self) -> None:
        self._queue_gathered()
        self._finishing = True
        while self._queue or any(worker.held for worker in self._workers):
            self._hand_out()
            if not self._queue and not any(worker.ranges for worker in self._workers):
                for worker in self._workers:
                    if worker.held and not worker.finishing:
                        worker.finishing = True
                        self._calls[worker.actor.finish.remote(self._rejects_for(worker))] = worker
            self._progress(timeout_s=None)

    def close(self) -> None:
        """End the workers, and Ray if this run started it."""
        closing = []
        for worker in self._workers:
            for reference in itertools.islice(worker.ranges, 1, None):
                ray.cancel(reference)
            if worker.held and not worker.finishing:
                closing.append(worker.actor.close.remote())
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_WITHIN_S)
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()
        self._calls.clear()
        self._cluster.leave()

    def _start(self) -> None:
        worker = _Worker(self._cluster.start(self._info))
        self._workers.append(worker)
        self._calls[worker.actor.open.remote()] = worker

    def _queue_gathered(self) -> None:
        if self._gathered:
            self._queue.append(self._gathered)
        self._gathered, self._gathered_tokens = [], 0

    def _hand_out(self) -> None:
        """Give queued ranges to the workers that have the fewest."""
        while self._queue:
            free = [each for each in self._workers if each.name and not each.finishing]
            worker = min(free, key=lambda each: len(each.ranges), default=None)
            if worker is None or len(worker.ranges) >= _RANGES_AHEAD:
                return
            items = self._queue.popleft()
            samples = [item.sample for item in items]
            reference = worker.actor.run.remote(samples, self._rejects_for(worker))
            self._calls[reference] = worker
            worker.ranges[reference] = items
            worker.held |= {item.identifier: item for item in items}

    def _rejects_for(self, worker: _Worker) -> list[Reject]:
        rejects, self._rejects = self._rejects, []
        worker.rejects += rejects
        return rejects

    def _progress(self, timeout_s: float | None) -> None:
        """Take in what the workers have done, waiting for the first to answer, and hand out more."""
        references = list(self._calls)
        while timeout_s is None and not any(worker.name for worker in self._workers):
            if ray.wait(references, timeout=_SAY_EVERY_S)[0]:
                break
            _log.info("no worker has loaded the target yet. %s", self._cluster.demand)
        ray.wait(references, timeout=timeout_s)
        answered, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in answered:
            # A worker that died meanwhile has no calls left.
            if reference in self._calls:
                self._answered(reference)
        self._hand_out()

    def _answered(self, reference: Any) -> None:
        worker = self._calls[reference]
        try:
            answer = ray.get(reference)
        except RayError as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, EngineDiedError):
                if isinstance(error.cause, SpecxError):
                    # As the user is to read it, without the traceback of another process.
                    raise error.cause from None
                raise
            self._died(worker)
            return
        del self._calls[reference]
        if isinstance(answer, str):
            worker.name = answer
            self._failed_starts = 0
            return
        worker.ranges.pop(reference, None)
        self._take_in(worker, answer)
        if worker.finishing:
            self._finished(worker)

    def _take_in(self, worker: _Worker, outcome: Outcome) -> None:
        if outcome.committed and not worker.seen:
            self._require_seen(worker, outcome.committed)
        for identifier in outcome.committed:
            worker.held.pop(identifier, None)
        outcome.rejects = [reject for reject in outcome.rejects if self._is_news(worker, reject)]
        self._outcome.add(outcome)
        if len(worker.held) + len(worker.rejects) >= worker.look_at:
            self._forget_committed(worker)

    def _is_news(self, worker: _Worker, reject: Reject) -> bool:
        """Let go of the sample of a reject; return whether the reject was not told already."""
        items = [item for item in worker.held.values() if item.row == (reject.source, reject.row)]
        if len(items) == 1:
            del worker.held[items[0].identifier]
        else:
            # A row of several answers: which of its samples it was will not be known.
            worker.unclear.append(reject)
        if self._told[reject]:
            self._told[reject] -= 1
            return False
        return True

    def _finished(self, worker: _Worker) -> None:
        """Let a worker go that has committed everything it was given."""
        self._leave(worker)
        unclear = {(reject.source, reject.row) for reject in worker.unclear}
        if lost := [item for item in self._uncommitted(worker, died=False) if item.row not in unclear]:
            raise EngineError(f"{_rows(lost)}: {worker.name} ended without committing them. Rerun the same command.")

    def _died(self, worker: _Worker) -> None:
        """Put back what a dead worker had not committed, and start another.

        Raises EngineError if workers die again and again over the same sample or while loading.
        """
        self._leave(worker)
        if not worker.name:
            self._failed_starts += 1
            if self._failed_starts >= _DEATHS:
                raise EngineError(
                    f"{self._failed_starts} workers in a row died while they loaded the target. If memory ran out, "
                    "lower --workers; Ray's logs, by default in /tmp/ray/session_latest/logs of the node, may say more."
                )
        else:
            self._put_back(worker)
        if not self._finishing or (self._queue and all(each.finishing for each in self._workers)):
            self._start()

    def _put_back(self, worker: _Worker) -> None:
        """Queue, ahead of all, what a dead worker had not committed."""
        lost = self._uncommitted(worker, died=True)
        _log.warning("%s died; %d sequences that it had not committed are run again", worker.name, len(lost))
        for item in lost:
            item.losses += 1
        ranges = [[item for item in items if item in lost] for items in worker.ranges.values()]
        running, *waiting = ranges or [[]]
        run = [item for item in lost if not any(item in items for items in ranges)]
        suspects = running or (run if worker.finishing else [])
        for item in suspects:
            item.deaths += 1
        if fatal := [item for item in running + run if item.deaths >= _DEATHS or item.losses >= _LOSSES]:
            raise EngineError(
                f"{_rows(fatal)}: {fatal[0].losses} workers died over this, the last of them {worker.name}. What was "
                "committed is kept. Leave it out of the data, or lower --workers if memory ran out."
            )
        # Suspects go alone, so that the next death tells which of them it was.
        alone = [[item] for item in suspects]
        others = [item for item in run if item not in suspects]
        again = [*self._ranges(others), *alone, *(items for items in waiting if items)]
        self._queue.extendleft(reversed(again))
        # Of these it is not known which samples they were: they will be met again.
        rows = {item.row for item in lost}
        self._told.update(reject for reject in worker.unclear if (reject.source, reject.row) in rows)
        recorded = self._recorded()
        self._rejects = [reject for reject in worker.rejects if reject not in recorded] + self._rejects

    def _ranges(self, items: list[_Item]) -> Iterator[list[_Item]]:
        """Cut samples into ranges again."""
        tokens, start = 0, 0
        for position, item in enumerate(items, start=1):
            tokens += len(item.sample.input_ids)
            if tokens >= self._range_tokens or position == len(items):
                yield items[start:position]
                tokens, start = 0, position

    def _leave(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._calls = {reference: each for reference, each in self._calls.items() if each is not worker}
        # Also if it is dead: it may only be out of reach.
        ray.kill(worker.actor)

    def _fresh_records(self) -> list[CommitRecord]:
        return [record for unit, record in self._store.records.items() if unit >= self._first_unit]

    def _committed(self) -> set[bytes]:
        """Return what the store has gained since this run began, by whomever."""
        self._store.refresh()
        return {bytes.fromhex(each) for record in self._fresh_records() for each in record.sequences.ids}

    def _recorded(self) -> set[Reject]:
        return {reject for record in self._fresh_records() for reject in record.rejected}

    def _uncommitted(self, worker: _Worker, *, died: bool) -> list[_Item]:
        """Return what a worker that has ended held and nobody committed; count what it committed unreported.

        A living worker reports all its commits: what else is in the store is another run's, unless an earlier
        worker of this run had it, died, and its commit showed late.
        """
        committed = self._committed() if worker.held else set()
        for item in worker.held.values():
            if item.identifier in committed and (died or item.losses):
                self._outcome.committed.append(item.identifier)
                self._outcome.tokens += len(item.sample.input_ids)
        return [item for identifier, item in worker.held.items() if identifier not in committed]

    def _forget_committed(self, worker: _Worker) -> None:
        """Drop what another run has committed meanwhile, which this worker will never report."""
        committed = self._committed()
        worker.held = {
            identifier: item for identifier, item in worker.held.items() if item.losses or identifier not in committed
        }
        recorded = self._recorded()
        worker.rejects = [reject for reject in worker.rejects if reject not in recorded]
        worker.look_at = max(_LOOK_AFTER, 2 * (len(worker.held) + len(worker.rejects)))

    def _require_seen(self, worker: _Worker, identifiers: Iterable[bytes]) -> None:
        """Raise EngineError if what a worker committed is not in the store as this process sees it."""
        until = time.monotonic() + _SEEN_WITHIN_S
        while not self._committed().issuperset(identifiers):
            if time.monotonic() > until:
                raise EngineError(
                    f"{self._store.root}: what {worker.name} committed does not appear here; its node has another "
                    "directory of that name. Use a store that every node sees."
                )
            time.sleep(1.0)
        worker.seen = True


def _rows(items: list[_Item]) -> str:
    """Name the rows that some samples came from, the first few of them."""
    rows = [f"{source}: row {row}" for source, row in (item.row for item in items[:_NAMED_ROWS])]
    more = len(items) - len(rows)
    return ", ".join(rows) + (f" and {more} more" if more else "")
