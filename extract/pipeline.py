"""``specx extract``: run the target once over the data and keep its features."""

import logging
import time
from dataclasses import dataclass

import torch

from ..run_file import ConfigError
from ..storage.hashing import sequence_id
from ..storage.rejects import write_rejects
from ..storage.schema import DatasetInfo, Reject
from ..storage.store import FeatureStore
from ..storage.summary import summary
from ..storage.writer import FeatureWriter
from .config import ExtractConfig
from .engines import Engine, NotFiniteError
from .engines.transformers import TransformersEngine
from .progress import Counts, Reporter, reporter
from .samples import Sample, SampleReader
from .target import Target, TargetError, copy_into, identify, open_target, resolve_boundaries

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSummary:
    """What one run did. ``sequences + reused + rejected`` is the number of rows read."""

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


def run(config: ExtractConfig) -> ExtractSummary:
    """Extend the store with the sequences of the data that it lacks.

    Whatever ends the run, the units committed so far stay. Raises SpecxError.
    """
    started = time.monotonic()
    target = open_target(config.target)
    info = _dataset_info(config, target)
    store = FeatureStore.create(config.store, info)
    copy_into(target, store)
    counts = Counts()
    try:
        with (
            FeatureWriter(store, tokens_per_part=config.tokens_per_part) as writer,
            reporter(config.limit) as shown,
        ):
            _extract(config, target, info, writer, counts, shown)
    except KeyboardInterrupt:
        _log.info("%s: interrupted; %d sequences are committed, rerun to go on", store.root, len(store.catalogue()))
        raise
    finally:
        write_rejects(store, counts.rejects)
    seconds = time.monotonic() - started
    _log.info("%s: %d sequences committed by this run", store.root, writer.committed_sequences)
    return ExtractSummary(
        sequences=writer.committed_sequences,
        tokens=writer.committed_tokens,
        reused=counts.reused + counts.sequences - writer.committed_sequences,
        rejected=len(counts.rejects),
        bytes_per_token=summary(store)["bytes_per_token"],
        tokens_per_s=round(writer.committed_tokens / seconds, 1),
        seconds=round(seconds, 2),
    )


def _extract(
    config: ExtractConfig,
    target: Target,
    info: DatasetInfo,
    writer: FeatureWriter,
    counts: Counts,
    shown: Reporter,
) -> None:
    engine: Engine | None = None
    for row in SampleReader(config, target):
        counts.rows += 1
        reject = row if isinstance(row, Reject) else None
        if isinstance(row, Sample):
            if sequence_id(row.input_ids) in writer:
                counts.reused += 1
            else:
                # Built for the first sequence that is missing: a rerun with nothing left loads no model.
                engine = engine or _engine(config, target, info)
                try:
                    writer.add(engine.features(row), row.origin)
                    counts.sequences += 1
                    counts.tokens += len(row.input_ids)
                except NotFiniteError as error:
                    origin = row.origin
                    reject = Reject(source=origin.source, row=origin.row, reason="not_finite", detail=str(error))
        if reject is not None:
            counts.rejects.append(reject)
            writer.reject(reject)
        shown.show(counts)


def _dataset_info(config: ExtractConfig, target: Target) -> DatasetInfo:
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
    )


def _engine(config: ExtractConfig, target: Target, info: DatasetInfo) -> Engine:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"options: device: {name!r} is not to be had here; use auto, cpu or cuda") from error
    return TransformersEngine(
        target,
        boundaries=info.boundaries,
        top_k=info.top_k,
        dtype=getattr(torch, info.compute_dtype),
        device=device,
    )
