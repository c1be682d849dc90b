"""``specx train``: stream stores into a draft; rerun to resume."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..storage.backends.durable import disk_errors
from ..storage.catalog.views import files_of_views, read_view, view_names
from ..storage.reader import FeatureReader
from ..storage.store import FeatureStore
from .config import TrainConfig
from .data.corpus import Corpus, require_alike
from .data.datamodule import FeatureData
from .data.draft_vocabulary import draft_vocabulary, token_counts
from .errors import TrainError
from .families.load import load_first
from .families.spec import draft_spec
from .loop.launch import launch
from .loop.loggers import require_packages
from .loop.run_directory import RunDirectory, RunRecord, StoreRecord, run_settings
from .loop.trainer import TrainSummary, fit

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
        record = directory.record()
        require_devices(config, record.batches_per_step)
        corpus = open_corpus(stores, record.stores, directory.spec().boundaries)
    else:
        batches_per_step = config.batches_per_step or config.devices
        require_devices(config, batches_per_step)
        info = stores[0].info
        spec = draft_spec(config, stores[0].target_directory, info.boundaries, has_last_hidden=info.last_hidden)
        require_alike(stores, spec.boundaries)
        records = store_records(config, stores)
        corpus = open_corpus(stores, records, spec.boundaries)
        data = FeatureData(config, corpus, batches_per_step)
        if config.init_from is None:
            vocabulary = draft_vocabulary(_weighted_counts(config, data), spec.draft_vocab_size)
        else:
            vocabulary = load_first(Path(config.init_from), spec).vocabulary.numpy()
            spec = spec.model_copy(update={"draft_vocab_size": len(vocabulary)})
        record = RunRecord(
            settings=run_settings(config), target=target, batches_per_step=batches_per_step, stores=records
        )
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


def open_corpus(stores: list[FeatureStore], records: tuple[StoreRecord, ...], boundaries: tuple[int, ...]) -> Corpus:
    """Open what a run takes of its stores."""
    return Corpus([_reader(*each) for each in zip(stores, records, strict=True)], boundaries)


def _weighted_counts(config: TrainConfig, data: FeatureData) -> npt.NDArray[np.float64]:
    """Count the supervised tokens (V,) that an epoch trains on."""
    stores = range(len(data.corpus.readers))
    counts = np.stack([token_counts(data.corpus, store, data.split.train) for store in stores])
    weighted: npt.NDArray[np.float64] = np.asarray(config.weights or [1.0 for _ in stores]) @ counts
    return weighted


def require_devices(config: TrainConfig, batches_per_step: int) -> None:
    """Raise TrainError if the devices asked for are not there or do not divide a step."""
    require_packages(config)
    if config.strategy == "fsdp" and not torch.cuda.is_available():
        raise TrainError("strategy: fsdp needs CUDA devices, found none. Use --strategy ddp.")
    if torch.cuda.is_available() and config.devices > torch.cuda.device_count():
        raise TrainError(f"devices: {config.devices} asked for, {torch.cuda.device_count()} GPUs found. Ask for fewer.")
    if batches_per_step % config.devices:
        raise TrainError(
            f"devices: a step of this run has {batches_per_step} batches, which {config.devices} devices cannot share "
            "evenly. Use a number of devices that divides it, or another batches_per_step."
        )


def store_records(config: TrainConfig, stores: list[FeatureStore]) -> tuple[StoreRecord, ...]:
    """Return what there is in each store now; a store that has none of the views is taken whole."""
    if len(stores) == 1:
        wanted = [config.view]
    else:
        names = [{*view_names(store), *(view for view in config.view if view.endswith(".parquet"))} for store in stores]
        if missing := [view for view in config.view if not any(view in known for known in names)]:
            raise TrainError(f"{', '.join(config.store)}: no view {missing[0]} in any. Make one by `extract --view`.")
        wanted = [tuple(view for view in config.view if view in known) for known in names]
    return tuple(
        StoreRecord(units=tuple(store.records), view_files=tuple(files_of_views(store, views)))
        for store, views in zip(stores, wanted, strict=True)
    )


def _reader(store: FeatureStore, record: StoreRecord) -> FeatureReader:
    if not record.view_files:
        return FeatureReader(store, record.units)
    view = read_view(store, record.view_files)
    reader = FeatureReader(store, record.units, view)
    if missing := len(view) - len(reader.catalogue):
        _log.info("%s: %d of the view's %d sequences are not in the store", store.root, missing, len(view))
    return reader
