"""One process of a training run, or the only one."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from ..config import TrainConfig
from ..data.corpus import Corpus
from ..data.datamodule import FeatureData
from ..data.draft_vocabulary import membership, offsets
from ..data.target_head import read_head
from ..errors import NotFiniteError
from ..families.load import load_first, set_first_weights
from ..families.registry import family
from ..loss.target_distribution import Vocabulary
from .callbacks import Checkpoints, ProgressLines
from .checkpoint import load_checkpoint, save_checkpoint
from .loggers import make_loggers
from .module import DraftModule
from .nonfinite import explain
from .run_directory import RunDirectory

_log = logging.getLogger(__name__)
# They set their own level when imported, and advertise below this one.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)


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
    best_step: int | None
    """Whose weights had the longest acceptance length on the held-out split."""
    tokens_per_s: float
    data_wait_fraction: float
    """Share of the training time that the first process spent waiting for batches, in the last session."""
    seconds: float


def fit(config: TrainConfig, directory: RunDirectory, corpus: Corpus, data: FeatureData | None = None) -> TrainSummary:
    """Train, or go on, to the end of a run that was begun. Raises SpecxError; KeyboardInterrupt once ^C is saved.

    ``data`` is the run's, if it is planned already: of a large corpus that takes seconds.
    """
    if data is None:
        data = FeatureData(
            config,
            corpus,
            config.devices,
            anchors=family(config.method).anchors(config.draft),
        )
    data.known = membership(directory.vocabulary(), corpus.info.vocab_size)
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if torch.cuda.is_available() else "32-true"
    module = _module(config, directory, corpus, data.steps, precision)
    is_resumed = directory.checkpoint.exists()
    has_holdout = len(data.split.holdout) > 0
    validate_every = min(config.validate_every, data.steps)
    checkpoints = Checkpoints(config, directory, validate_every if has_holdout else None)
    has_terminal = sys.stderr.isatty()
    trainer = Trainer(
        accelerator="auto",
        devices=config.devices,
        strategy=_strategy(config),
        precision=precision,
        max_epochs=1,
        max_steps=data.steps,
        accumulate_grad_batches=data.accumulated,
        val_check_interval=validate_every * data.accumulated,
        limit_val_batches=None if has_holdout else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=make_loggers(
            config, directory, load_checkpoint(directory.checkpoint)["global_step"] if is_resumed else 0
        ),
        callbacks=_callbacks(checkpoints, has_terminal),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=has_terminal,
        use_distributed_sampler=False,
    )
    if trainer.is_global_zero and (line := data.oversized()):
        _log.warning("%s", line)
    checkpoint = directory.checkpoint if is_resumed else None
    try:
        with checkpoints.listening(), _expected_warnings_silenced():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if checkpoints.is_interrupted:
            if trainer.is_global_zero:
                _log.info("%s: stopped and saved at step %d; rerun to go on", directory.path, trainer.global_step)
            raise KeyboardInterrupt
        save_checkpoint(trainer, directory.checkpoint)
        if has_holdout and module.validated_step != trainer.global_step:
            with _expected_warnings_silenced():
                trainer.validate(module, datamodule=data, verbose=False, weights_only=True)
    except NotFiniteError as error:
        raise explain(error, data, directory) from error
    return _summary(trainer, module, data, checkpoints)


def _strategy(config: TrainConfig) -> Strategy | str:
    if config.strategy == "fsdp":
        # A checkpoint is whole, so that the run may go on, and be exported, with any devices.
        return FSDPStrategy(state_dict_type="full")
    if config.devices == 1:
        return "auto"
    # Buffers are constants, the target's embedding among them: they need not be sent around.
    return DDPStrategy(broadcast_buffers=False)


def _callbacks(checkpoints: Checkpoints, has_terminal: bool) -> list[Callback]:
    return [checkpoints, RichProgressBar(console_kwargs={"stderr": True}) if has_terminal else ProgressLines()]


@contextmanager
def _expected_warnings_silenced() -> Iterator[None]:
    """Hold back what Lightning says of a directory that is resumed, and of itself."""
    with warnings.catch_warnings():
        for message in (
            "Checkpoint directory .* exists",
            "Experiment logs directory .* exists",
            ".*LeafSpec.*",
            # What is to replace it does send them once.
            ".*broadcast_buffers.* is deprecated",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def _module(config: TrainConfig, directory: RunDirectory, corpus: Corpus, steps: int, precision: str) -> DraftModule:
    spec, ids = directory.spec(), directory.vocabulary()
    head = read_head(corpus.readers[0].store, ids)
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    vocabulary = Vocabulary(
        d2t=torch.from_numpy(offsets(ids)),
        t2d=torch.from_numpy(membership(ids, spec.vocab_size)),
        target_head=head.lm_head_rows.to(dtype),
        head_transform=head.transform,
    )
    seed_everything(config.seed, verbose=False)
    module = DraftModule(config, spec, vocabulary, head.embed_tokens, steps)
    # The draft that a run started from may be gone when it goes on.
    is_warm = config.init_from is not None and not directory.checkpoint.exists()
    set_first_weights(module.draft, head, load_first(Path(str(config.init_from)), spec) if is_warm else None)
    return module


def _summary(trainer: Trainer, module: DraftModule, data: FeatureData, checkpoints: Checkpoints) -> TrainSummary:
    values = module.last_metrics
    assert data.loader is not None
    return TrainSummary(
        steps=trainer.global_step,
        tokens=module.tokens_trained,
        loss=round(values["loss"], 5),
        accuracy=round(values["accuracy"], 4),
        acceptance_length=round(values["acceptance_length"], 4),
        best_step=checkpoints.best_step,
        tokens_per_s=round(module.tokens_trained / module.seconds_trained, 1),
        data_wait_fraction=round(data.loader.wait_s / max(module.session_seconds, 1e-9), 4),
        seconds=round(module.seconds_trained, 2),
    )
