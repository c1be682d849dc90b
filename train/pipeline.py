"""``specx train``: stream a store into a draft; rerun to resume."""

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from ..storage.files import disk_errors
from ..storage.reader import FeatureReader
from ..storage.store import FeatureStore
from ..storage.views import files_of_views, read_view
from .callbacks import ProgressLines, StopOnInterrupt
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import FeatureData
from .exported import load_first, set_first_weights
from .head import read_head
from .module import DraftModule
from .objective import Vocabulary
from .run import RunDirectory, RunRecord, run_settings
from .spec import draft_spec
from .vocabulary import draft_vocabulary, membership, offsets, token_counts

_log = logging.getLogger(__name__)
# It sets its own level when imported, and advertises below this one.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """What a complete run came to. The metrics are the held-out split's, the last batch's without one."""

    steps: int
    tokens: int
    loss: float
    accuracy: float
    """Of step 0: the draft's best token is the target's."""
    acceptance_length: float
    """Simulated, K drafted tokens and the bonus."""
    tokens_per_s: float
    data_wait_fraction: float
    """Share of the training time spent waiting for batches, in the last session."""
    seconds: float


def run(config: TrainConfig) -> TrainSummary:
    """Train, or resume, or return the summary of a run that is complete. Raises SpecxError."""
    directory = RunDirectory(config.out)
    store = FeatureStore.open(config.store, cache_bytes=config.cache_bytes)
    settings, target = run_settings(config), store.info.target.model_dump()
    if directory.is_begun:
        directory.require_same(settings, target)
        if directory.result.exists():
            _log.info("%s: the run is complete", directory.path)
            return TrainSummary(**json.loads(directory.result.read_text()))
        record = directory.record()
        reader = _reader(store, record.units, record.view_files)
        data = FeatureData(config, reader, directory.spec().boundaries)
    else:
        view_files = tuple(files_of_views(store, config.view))
        reader = _reader(store, tuple(store.records), view_files)
        spec = draft_spec(config, store.target_directory, store.info.boundaries, has_last_hidden=store.info.last_hidden)
        data = FeatureData(config, reader, spec.boundaries)
        if config.init_from is None:
            vocabulary = draft_vocabulary(token_counts(reader, data.split.train), spec.draft_vocab_size)
        else:
            vocabulary = load_first(Path(config.init_from), spec).vocabulary.numpy()
            spec = spec.model_copy(update={"draft_vocab_size": len(vocabulary)})
        record = RunRecord(settings=settings, target=target, units=tuple(store.records), view_files=view_files)
        directory.begin(record, spec, vocabulary)
    with disk_errors(directory.path):
        summary = _fit(config, directory, store, data)
        directory.finish(dataclasses.asdict(summary))
    return summary


def _reader(store: FeatureStore, units: tuple[int, ...], view_files: tuple[str, ...]) -> FeatureReader:
    if not view_files:
        return FeatureReader(store, units)
    view = read_view(store, view_files)
    reader = FeatureReader(store, units, view)
    if missing := len(view) - len(reader.catalogue):
        _log.info("%s: %d of the view's %d sequences are not in the store", store.root, missing, len(view))
    return reader


def _fit(config: TrainConfig, directory: RunDirectory, store: FeatureStore, data: FeatureData) -> TrainSummary:
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if torch.cuda.is_available() else "32-true"
    module = _module(config, directory, store, len(data.plans), precision)
    is_resumed = directory.checkpoint.exists()
    interrupt = StopOnInterrupt(directory.checkpoint)
    has_terminal = sys.stderr.isatty()
    callbacks: list[Callback] = [
        interrupt,
        ModelCheckpoint(
            dirpath=directory.checkpoint.parent,
            filename=directory.checkpoint.stem,
            every_n_train_steps=config.checkpoint_every,
            enable_version_counter=False,
        ),
        RichProgressBar(console_kwargs={"stderr": True}) if has_terminal else ProgressLines(),
    ]
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,
        max_epochs=1,
        max_steps=len(data.plans),
        gradient_clip_val=config.gradient_clip,
        val_check_interval=min(config.validate_every, len(data.plans)),
        limit_val_batches=None if len(data.split.holdout) else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=_loggers(directory, load_checkpoint(directory)["global_step"] if is_resumed else 0),
        callbacks=callbacks,
        enable_model_summary=False,
        enable_progress_bar=has_terminal,
    )
    with interrupt.listening(), _expected_warnings_silenced():
        trainer.fit(module, datamodule=data, ckpt_path=directory.checkpoint if is_resumed else None, weights_only=True)
    if trainer.global_step < len(data.plans):
        _log.info("%s: stopped and saved at step %d; rerun to go on", directory.path, trainer.global_step)
        raise KeyboardInterrupt
    save_checkpoint(trainer, directory.checkpoint)
    if len(data.split.holdout):
        with _expected_warnings_silenced():
            trainer.validate(module, datamodule=data, verbose=False, weights_only=True)
    return _summary(trainer, module, data)


@contextmanager
def _expected_warnings_silenced() -> Iterator[None]:
    """Hold back what Lightning says of a directory that is resumed, and of itself."""
    with warnings.catch_warnings():
        for message in ("Checkpoint directory .* exists", "Experiment logs directory .* exists", ".*LeafSpec.*"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _module(
    config: TrainConfig, directory: RunDirectory, store: FeatureStore, steps: int, precision: str
) -> DraftModule:
    spec, ids = directory.spec(), directory.vocabulary()
    head = read_head(store, ids)
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    vocabulary = Vocabulary(
        d2t=torch.from_numpy(offsets(ids)),
        t2d=torch.from_numpy(membership(ids, spec.vocab_size)),
        target_head=head.lm_head_rows.to(dtype),
    )
    seed_everything(config.seed, verbose=False)
    module = DraftModule(config, spec, vocabulary, head.embed_tokens, steps)
    if not directory.checkpoint.exists():
        first = None if config.init_from is None else load_first(Path(config.init_from), spec)
        set_first_weights(module.draft, head, first)
    return module


def _loggers(directory: RunDirectory, first_step: int) -> list[Logger]:
    # What a killed run logged behind its last checkpoint is superseded: TensorBoard drops it by
    # ``purge_step``, and each start has a CSV of its own.
    return [
        TensorBoardLogger(directory.logs, name="tensorboard", version="", purge_step=first_step or None),
        CSVLogger(directory.logs, name="csv", version=f"from_step_{first_step:07d}", flush_logs_every_n_steps=1),
    ]


def _summary(trainer: Trainer, module: DraftModule, data: FeatureData) -> TrainSummary:
    values = module.last_metrics
    assert data.loader is not None
    return TrainSummary(
        steps=trainer.global_step,
        tokens=module.tokens_trained,
        loss=round(values["loss"], 5),
        accuracy=round(values["accuracy"], 4),
        acceptance_length=round(values["acceptance_length"], 4),
        tokens_per_s=round(module.tokens_trained / module.seconds_trained, 1),
        data_wait_fraction=round(data.loader.wait_s / max(module.session_seconds, 1e-9), 4),
        seconds=round(module.seconds_trained, 2),
    )
