"""The best checkpoint and the early end."""

import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specx.train.config import TrainConfig
from specx.train.errors import TrainError
from specx.train.export.write import export, read_trained
from specx.train.loop.checkpoint import load_checkpoint
from specx.train.loop.run_directory import RunDirectory
from specx.train.pipeline import run

LENGTH = "val/acceptance_length"


def settings(store: Path, out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": 60,
        "step_tokens": 1024,
        "draft_vocab_size": 512,
        "lr": 3e-3,
        "ttt_steps": 2,
        "holdout_fraction": 0.1,
        "checkpoint_every": 3,
        "validate_every": 4,
        "early_stopping": 2,
        "log_every": 100,
    }
    return TrainConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A run whose learning rate is 0 from the start: nothing ever gets better than the first validation."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    summary = run(settings(tiny_store, out, lr=1e-12))
    assert (summary.steps, summary.best_step) == (12, 4)
    return out


def test_the_best_of_a_run_has_its_longest_acceptance_length(
    tmp_path: Path, tiny_store: Path, loss_curve: Callable[..., dict[int, float]]
) -> None:
    out = tmp_path / "run"
    summary = run(settings(tiny_store, out, max_steps=18, early_stopping=None))
    curve = loss_curve(out, LENGTH)
    assert sorted(curve) == [4, 8, 12, 16, 18]
    best = max(curve, key=lambda step: (curve[step], -step))
    assert summary.best_step == best
    checkpoint = load_checkpoint(out / "checkpoints" / "best.ckpt")
    assert checkpoint["global_step"] == best
    assert "optimizer_states" not in checkpoint


def test_a_run_ends_after_so_many_validations_without_progress_and_is_complete(
    tiny_store: Path, stopped: Path, loss_curve: Callable[..., dict[int, float]]
) -> None:
    assert sorted(loss_curve(stopped, LENGTH)) == [4, 8, 12]
    before = (stopped / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run(settings(tiny_store, stopped, lr=1e-12)).steps == 12
    assert (stopped / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_an_early_end_is_remembered_although_the_run_was_killed_before_its_summary(
    tmp_path: Path, tiny_store: Path, stopped: Path
) -> None:
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    (out / "result.json").unlink()
    summary = run(settings(tiny_store, out, lr=1e-12))
    assert (summary.steps, summary.best_step) == (12, 4)


def test_a_resumed_run_counts_on_where_it_stopped_counting(
    tmp_path: Path, tiny_store: Path, loss_curve: Callable[..., dict[int, float]]
) -> None:
    """Its last checkpoint is of a step that was validated on: that validation is neither lost nor repeated."""
    out = tmp_path / "run"
    config = settings(tiny_store, out, lr=1e-12, checkpoint_every=8, early_stopping=4)
    process = multiprocessing.get_context("spawn").Process(target=run, args=(config,))
    process.start()
    while process.is_alive() and not (out / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert load_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] == 8
    summary = run(config)
    assert (summary.steps, summary.best_step) == (20, 4)
    assert sorted(loss_curve(out, LENGTH)) == [4, 8, 12, 16, 20]


def test_the_best_is_exported_unless_the_last_is_asked_for(tmp_path: Path, stopped: Path) -> None:
    assert export(stopped, tmp_path / "default").checkpoint == "best"
    assert export(stopped, tmp_path / "last", checkpoint="last").checkpoint == "last"
    directory = RunDirectory(stopped)
    best, last = (read_trained(directory, which) for which in ("best", "last"))
    assert any(not torch.equal(best.weights[name], last.weights[name]) for name in best.weights)


def test_a_best_that_is_not_there_is_named(tmp_path: Path, tiny_store: Path) -> None:
    run(settings(tiny_store, tmp_path / "run", max_steps=2, holdout_fraction=0.0, early_stopping=None))
    assert export(tmp_path / "run", tmp_path / "draft").checkpoint == "last"
    with pytest.raises(TrainError, match=r"best.ckpt: no checkpoint"):
        export(tmp_path / "run", tmp_path / "other", checkpoint="best")
