"""What a dry run foretells, against what a run takes."""

import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from specx.train.checkpoint import load_checkpoint
from specx.train.config import TrainConfig
from specx.train.errors import TrainError
from specx.train.forecast import forecast
from specx.train.pipeline import run

STEPS = 3


def settings(store: Path, out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": STEPS,
        "batch_tokens": 16_384,
        "draft_vocab_size": 1024,
        "holdout_fraction": 0.0,
        "loggers": ["csv"],
    }
    return TrainConfig.model_validate(base | changes)


def peak_bytes() -> int:
    """Return the most memory that this process has held; ``ru_maxrss`` would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def train(config: TrainConfig, results: Connection) -> None:
    before = peak_bytes()
    summary = run(config)
    results.send((summary, peak_bytes() - before))


def test_memory_is_foretold_within_a_half_and_time_within_a_factor(tmp_path: Path, tiny_store: Path) -> None:
    config = settings(tiny_store, tmp_path / "run")
    foretold = forecast(config)
    assert not (tmp_path / "run").exists()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(config, theirs))
    process.start()
    summary, added = ours.recv()
    process.join()
    assert (foretold.steps, foretold.tokens) == (summary.steps, summary.tokens)
    assert foretold.peak_bytes == pytest.approx(added, rel=0.5)
    # Other programs on the machine slow both down, not at the same moments.
    assert 1 / 6 < foretold.step_s / (summary.seconds / summary.steps) < 6
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    weights = [weight for name, weight in checkpoint["state_dict"].items() if name.startswith("draft.")]
    assert foretold.parameters == sum(weight.numel() for weight in weights)


def test_devices_share_the_work_and_not_the_weights(tmp_path: Path, tiny_store: Path) -> None:
    one, two = (
        forecast(settings(tiny_store, tmp_path, batches_per_step=4, batch_tokens=1024, devices=n)) for n in (1, 2)
    )
    assert two.flops_per_step == one.flops_per_step / 2
    assert two.parameter_bytes == one.parameter_bytes
    assert two.steps == one.steps


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, tiny_store: Path) -> None:
    with pytest.raises(TrainError, match="boundary 2 is not in the store"):
        forecast(settings(tiny_store, tmp_path, boundaries=(2,)))


def test_the_command_line_prints_it_and_writes_nothing(
    specx: Callable[..., object], tmp_path: Path, tiny_store: Path
) -> None:
    result = specx("train", "--store", tiny_store, "--out", tmp_path / "run", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    assert {"parameters", "optimizer_bytes", "activation_bytes", "peak_bytes", "steps", "step_s", "total_s"} <= set(
        values
    )
    assert not (tmp_path / "run").exists()
