"""``specx extract``: run the target once over the data and keep its features."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..hub import TargetError
from ..storage.catalog.rejects import RejectLog
from ..storage.catalog.sequence_id import names_of, sequence_id
from ..storage.catalog.views import ViewWriter
from ..storage.ops.info import summary
from ..storage.schema import DatasetInfo, Reject
from ..storage.store import FeatureStore
from .config import ExtractConfig
from .data.samples import Sample, SampleReader
from .engines.base import ExtractionEngine
from .engines.factory import open_engine
from .engines.sink import Outcome
from .plan import expect, require_room
from .progress import Progressed, Reporter, reporter
from .target import Target, copy_into, identify, open_target, resolve_boundaries

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSummary:
    """What one run did. ``sequences + reused + rejected`` is the number of answers in the rows read."""

    sequences: int
    """Run through the target and committed."""
    tokens: int
    reused: int
    """Rows whose sequence the store had already."""
    rejected: int
    bytes_per_token: float
    """Of the whole store."""
    tokens_per_s: float
    seconds: float
    writer_wait_fraction: float
    """Share of the time that engines stood still because writing was slower."""


def run(config: ExtractConfig) -> ExtractSummary:
    """Extend the store with the sequences of the data that it lacks.

    Whatever ends the run, the units committed so far stay. Raises SpecxError.
    """
    started = time.monotonic()
    target = open_target(config.target)
    info = dataset_info(config, target)
    store = FeatureStore.create(config.store, info)
    if (expected := expect(config, target)) is not None:
        # By tokens: what a store has of the same data is known exactly, what it takes is estimated.
        stored = int(store.catalogue().length.sum())
        share = min(1.0, stored / max(expected.store.tokens, 1))
        require_room(config.store, expected, force=config.force, stored_bytes=round(share * expected.bytes))
    copy_into(target, store)
    counts = _Counts()
    try:
        with RejectLog(store.place) as rejects, _view(config, store) as view, reporter(config.limit) as shown:
            _extract(config, target, store, _Ledger(counts, rejects, view, shown))
    except KeyboardInterrupt:
        store.refresh()
        _log.info("%s: interrupted; %d sequences are committed, rerun to go on", store.root, len(store.catalogue()))
        raise
    store.refresh()
    store.records.save_index()
    seconds = time.monotonic() - started
    _log.info("%s: %d sequences committed by this run", store.root, counts.committed)
    return ExtractSummary(
        sequences=counts.committed,
        tokens=counts.tokens,
        reused=counts.rows - counts.committed - counts.rejected,
        rejected=counts.rejected,
        bytes_per_token=summary(store)["bytes_per_token"],
        tokens_per_s=round(counts.tokens / seconds, 1),
        seconds=round(seconds, 2),
        writer_wait_fraction=round(counts.waited_s / (seconds * config.workers), 4),
    )


@dataclass(kw_only=True, slots=True)
class _Counts:
    rows: int = 0
    """Samples and rejects read from the data."""
    committed: int = 0
    """Sequences this run added to the store."""
    tokens: int = 0
    """Of these."""
    waited_s: float = 0.0
    """Time engines stood still for their writers, all engines together."""
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class _Ledger:
    """Where a run's results are noted: for its summary, for the user to look up, on the terminal."""

    counts: _Counts
    rejects: RejectLog
    view: ViewWriter | None
    shown: Reporter

    def meet(self, sample: Sample, identifier: bytes) -> None:
        """Note a sequence of the data, new or not."""
        if self.view:
            self.view.add(identifier, sample.loss_mask, sample.origin)

    def reject(self, reject: Reject) -> None:
        self.counts.rejected += 1
        self.rejects.add(reject)

    def add(self, outcome: Outcome) -> None:
        self.counts.committed += len(outcome.committed)
        self.counts.tokens += outcome.tokens
        self.counts.waited_s += outcome.waited_s
        for reject in outcome.rejects:
            self.reject(reject)
        counts = self.counts
        note = f"{counts.committed:,} sequences and {counts.tokens:,} tokens committed, {counts.rejected} rejected"
        self.shown.show(Progressed(counts.rows, counts.tokens, note))


def _extract(config: ExtractConfig, target: Target, store: FeatureStore, ledger: _Ledger) -> None:
    known = set(names_of(store.catalogue().ids))
    engine: ExtractionEngine | None = None
    try:
        for row in SampleReader(config, target):
            ledger.counts.rows += 1
            if isinstance(row, Reject):
                ledger.reject(row)
                if engine:
                    engine.reject(row)
            else:
                identifier = sequence_id(row.input_ids)
                ledger.meet(row, identifier)
                if identifier not in known:
                    known.add(identifier)
                    # Built for the first sequence that is missing: a rerun with nothing left loads no model.
                    engine = engine or open_engine(config, target, store.info)
                    engine.add(row)
            ledger.add(engine.take() if engine else Outcome())
        if engine:
            engine.finish()
            ledger.add(engine.take())
    finally:
        if engine:
            engine.close()


def _view(config: ExtractConfig, store: FeatureStore) -> AbstractContextManager[ViewWriter | None]:
    return nullcontext() if config.view is None else ViewWriter(store.place, config.view)


def dataset_info(config: ExtractConfig, target: Target) -> DatasetInfo:
    """Return what a store made with these settings says of itself; raise TargetError if they do not fit the target."""
    if config.top_k > target.vocab_size:
        raise TargetError(f"{target.path}: top_k {config.top_k} is larger than the vocabulary, {target.vocab_size}.")
    return DatasetInfo(
        target=identify(target),
        compute_dtype=target.dtype if config.dtype == "auto" else config.dtype,
        boundaries=resolve_boundaries(target, config.boundaries),
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        top_k=config.top_k,
        codec=config.codec,
        last_hidden=config.last_hidden,
    )
