"""``specx train``: stream stores into a draft; rerun to resume."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..storage.backends.durable import disk_errors
from ..storage.store import FeatureStore
from .config import TrainConfig
from .data.corpus import require_alike
from .data.datamodule import FeatureData
from .data.draft_vocabulary import draft_vocabulary, token_counts
from .families.load import load_first
from .families.registry import family
from .loop.launch import launch
from .loop.run_directory import RUN_FORMAT, RunDirectory, RunRecord, run_settings
from .loop.trainer import TrainSummary, fit
from .opening import new_spec, open_corpus, require_devices, store_records

_log = logging.getLogger(__name__)


def run(config: TrainConfig) -> TrainSummary:
    """Train, or resume, or return the summary of a run that is complete. Raises SpecxError."""
    directory = RunDirectory(config.out)
    stores = [FeatureStore.open(store, cache_bytes=config.cache_bytes) for store in config.store]
    target = stores[0].info.target.model_dump()
    data = None
    if directory.is_begun:
        directory.require_same(config, target)
        if directory.result.exists():
            _log.info("%s: the run is complete", directory.path)
            return TrainSummary(**json.loads(directory.result.read_text()))
        directory.require_resumable()
        require_devices(config)
        corpus = open_corpus(stores, directory.record().stores, directory.spec().boundaries)
    else:
        require_devices(config)
        spec = new_spec(config, stores[0])
        require_alike(stores, spec.boundaries)
        records = store_records(config, stores)
        corpus = open_corpus(stores, records, spec.boundaries)
        data = FeatureData(config, corpus, config.devices, anchors=family(config.method).anchors(config.draft))
        if config.init_from is None:
            vocabulary = draft_vocabulary(_weighted_counts(config, data), spec.draft_vocab_size)
        else:
            vocabulary = load_first(Path(config.init_from), spec).vocabulary.numpy()
            spec = spec.model_copy(update={"draft_vocab_size": len(vocabulary)})
        record = RunRecord(format=RUN_FORMAT, settings=run_settings(config), target=target, stores=records)
        directory.begin(record, spec, vocabulary)
    with disk_errors(directory.path):
        if config.devices == 1 and config.strategy != "fsdp":
            summary = fit(config, directory, corpus, data)
        else:
            summary = TrainSummary(**launch(config, fit_rank))
        directory.finish(dataclasses.asdict(summary))
    return summary


def fit_rank(config: TrainConfig) -> dict[str, int | float | None]:
    """Be one process of several of a run that was begun; return its summary."""
    directory = RunDirectory(config.out)
    stores = [FeatureStore.open(store, cache_bytes=config.cache_bytes) for store in config.store]
    corpus = open_corpus(stores, directory.record().stores, directory.spec().boundaries)
    return dataclasses.asdict(fit(config, directory, corpus))


def _weighted_counts(config: TrainConfig, data: FeatureData) -> npt.NDArray[np.float64]:
    """Count the supervised tokens (V,) that an epoch trains on."""
    stores = range(len(data.corpus.readers))
    counts = np.stack([token_counts(data.corpus, store, data.split.train) for store in stores])
    weighted: npt.NDArray[np.float64] = np.asarray(config.weights or [1.0 for _ in stores]) @ counts
    return weighted
