"""What a run is made of, opened and checked before it starts: stores, corpus, draft, devices."""

import logging

import torch

from ..storage.catalog.views import files_of_views, read_view, view_names
from ..storage.reader import FeatureReader
from ..storage.store import FeatureStore
from .config import TrainConfig
from .data.corpus import Corpus
from .errors import TrainError
from .families.base import StoredFeatures
from .families.registry import family
from .families.spec import DraftSpec
from .families.targets import read_target
from .loop.loggers import require_packages
from .loop.run_directory import StoreRecord

_log = logging.getLogger(__name__)


def open_corpus(stores: list[FeatureStore], records: tuple[StoreRecord, ...], boundaries: tuple[int, ...]) -> Corpus:
    """Open what a run takes of its stores."""
    return Corpus([_reader(*each) for each in zip(stores, records, strict=True)], boundaries)


def new_spec(config: TrainConfig, store: FeatureStore) -> DraftSpec:
    """Return the draft of a run's settings for a store's target. Raises TrainError if the store does not suffice."""
    target = read_target(store.target_directory, config.store[0])
    stored = StoredFeatures(boundaries=store.info.boundaries, last_hidden=store.info.last_hidden)
    spec: DraftSpec = family(config.method).make_spec(config.draft, target, stored)
    return spec


def require_devices(config: TrainConfig) -> None:
    """Raise TrainError if the devices asked for are not there."""
    require_packages(config)
    if config.strategy == "fsdp" and not torch.cuda.is_available():
        raise TrainError("strategy: fsdp needs CUDA devices, found none. Use --strategy ddp.")
    if torch.cuda.is_available() and config.devices > torch.cuda.device_count():
        raise TrainError(f"devices: {config.devices} asked for, {torch.cuda.device_count()} GPUs found. Ask for fewer.")


def store_records(config: TrainConfig, stores: list[FeatureStore]) -> tuple[StoreRecord, ...]:
    """Return what there is in each store now; a store that has none of the views is taken whole."""
    if len(stores) == 1:
        wanted = [config.view]
    else:
        names = [
            {*view_names(store.place), *(view for view in config.view if view.endswith(".parquet"))} for store in stores
        ]
        if missing := [view for view in config.view if not any(view in known for known in names)]:
            raise TrainError(f"{', '.join(config.store)}: no view {missing[0]} in any. Make one by `extract --view`.")
        wanted = [tuple(view for view in config.view if view in known) for known in names]
    return tuple(
        StoreRecord(units=tuple(store.records), view_files=tuple(files_of_views(store.place, views)))
        for store, views in zip(stores, wanted, strict=True)
    )


def _reader(store: FeatureStore, record: StoreRecord) -> FeatureReader:
    if not record.view_files:
        return FeatureReader(store, record.units)
    view = read_view(store.place, record.view_files)
    reader = FeatureReader(store, record.units, view)
    if missing := len(view) - len(reader.catalogue):
        _log.info("%s: %d of the view's %d sequences are not in the store", store.root, missing, len(view))
    return reader
