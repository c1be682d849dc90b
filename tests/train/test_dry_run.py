"""What a dry run foretells, against what a run takes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from specx.train.config import TrainConfig
from specx.train.dry_run import forecast
from specx.train.errors import TrainError
from specx.train.loop.checkpoint import load_checkpoint

STEPS = 2


def settings(store: Path, out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": STEPS,
        "draft_vocab_size": 1024,
        "holdout_fraction": 0.0,
        "loggers": ["csv"],
    }
    return TrainConfig.model_validate(base | changes)


RUN = """
import dataclasses, json, sys
from pathlib import Path
from specx.train.config import TrainConfig
from specx.train.pipeline import run

def peak():  # ru_maxrss would count that of the process before
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

config = TrainConfig.model_validate_json(sys.argv[1])
before = peak()
summary = run(config)
print(json.dumps(dataclasses.asdict(summary) | {"added": peak() - before}))
"""


def test_memory_is_foretold_within_a_factor_of_two(tmp_path: Path, tiny_store: Path) -> None:
    config = settings(tiny_store, tmp_path / "run")
    foretold = forecast(config)
    assert not (tmp_path / "run").exists()
    done = subprocess.run([sys.executable, "-c", RUN, config.model_dump_json()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (foretold.steps, foretold.tokens) == (found["steps"], found["tokens"])
    assert 1 / 2 < foretold.peak_bytes / found["added"] < 2
    assert foretold.step_s > 0
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    weights = [weight for name, weight in checkpoint["state_dict"].items() if name.startswith("draft.")]
    assert foretold.parameters == sum(weight.numel() for weight in weights)


def test_devices_share_the_work_and_not_the_weights(tmp_path: Path, tiny_store: Path) -> None:
    one, two = (
        forecast(settings(tiny_store, tmp_path, step_tokens=4096, batch_tokens=1024, devices=n)) for n in (1, 2)
    )
    assert two.flops_per_step == pytest.approx(one.flops_per_step / 2)
    assert two.parameter_bytes == one.parameter_bytes
    assert two.steps == one.steps
    assert (one.step_tokens, two.step_tokens) == (4096, 4096)
    assert one.batches_per_step >= 4


def test_what_a_device_holds_decides_the_memory_and_nothing_of_the_run(tmp_path: Path, tiny_store: Path) -> None:
    small, large = (forecast(settings(tiny_store, tmp_path, step_tokens=8192, batch_tokens=n)) for n in (1024, 8192))
    assert (small.steps, small.tokens) == (large.steps, large.tokens)
    assert small.flops_per_step == pytest.approx(large.flops_per_step)
    assert small.batch_bytes < 0.2 * large.batch_bytes
    assert small.activation_bytes < large.activation_bytes


def test_a_dry_run_names_sequences_longer_than_a_batch(
    tmp_path: Path, tiny_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forecast(settings(tiny_store, tmp_path, batch_tokens=256))
    (line,) = [record.getMessage() for record in caplog.records if "more than a batch may have" in record.getMessage()]
    assert "cut them with --max-length" in line


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
