"""Where the curves go."""

import importlib.util
from pathlib import Path

import pytest

from specx.train.config import TrainConfig
from specx.train.errors import TrainError
from specx.train.pipeline import run


def settings(store: Path, out: Path, *loggers: str) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": 2,
        "step_tokens": 512,
        "draft_vocab_size": 256,
        "ttt_steps": 1,
        "holdout_fraction": 0.0,
        "log_every": 1,
    }
    return TrainConfig.model_validate(base | {"loggers": loggers})


def test_only_the_loggers_asked_for_write(tmp_path: Path, tiny_store: Path) -> None:
    run(settings(tiny_store, tmp_path / "run", "csv"))
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["csv"]


def test_a_run_without_loggers_is_a_run(tmp_path: Path, tiny_store: Path) -> None:
    assert run(settings(tiny_store, tmp_path / "run")).steps == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_missing_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_store: Path, name: str
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(TrainError, match=f"{name} needs a package that is not installed. Run `pip install {name}`"):
        run(settings(tiny_store, tmp_path / "run", name))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")
def test_wandb_keeps_the_curve_in_files_where_it_is_offline(
    tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(settings(tiny_store, tmp_path / "run", "wandb"))
    assert list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_the_curve_in_files_without_a_server(
    tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run(settings(tiny_store, tmp_path / "run", "mlflow"))
    assert list((tmp_path / "run" / "logs" / "mlflow").glob("*/*/metrics/train/loss"))
