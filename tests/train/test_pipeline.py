"""Training runs: whole, killed and resumed, without the target."""

import csv
import dataclasses
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.errors import TrainError
from specx.train.export.write import export
from specx.train.pipeline import run

from ..program import SPECX

pytestmark = pytest.mark.long

STEPS = 40


def settings(store: Path, out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": STEPS,
        "step_tokens": 1024,
        "draft_vocab_size": 512,
        "lr": 2e-3,
        "ttt_steps": 2,
        "checkpoint_every": 5,
        "log_every": 1,
        "validate_every": 20,
    }
    return TrainConfig.model_validate(base | changes)


def loss_curve(out: Path) -> dict[int, float]:
    """Loss by step, of all sessions of a run; a later session's word counts."""
    curve = {}
    for path in sorted(out.glob("logs/csv/from_step_*/metrics.csv")):
        # The last line may be half written.
        lines = path.read_text().splitlines(keepends=True)
        for row in csv.DictReader(line for line in lines if line.endswith("\n")):
            if row["train/loss"]:
                curve[int(row["step"])] = float(row["train/loss"])
    return curve


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(settings(tiny_store, out))
    return out


def test_a_run_killed_at_random_steps_has_the_loss_curve_of_an_undisturbed_one(
    tmp_path: Path, tiny_store: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    config = settings(tiny_store, out)
    context = multiprocessing.get_context("spawn")
    generator = random.Random(0)
    for _ in range(2):
        kill_at = max(loss_curve(out), default=0) + generator.randint(6, 12)
        process = context.Process(target=run, args=(config,))
        process.start()
        while process.is_alive() and max(loss_curve(out), default=0) < kill_at:
            time.sleep(0.005)
        process.join(timeout=generator.uniform(0, 0.05))
        process.kill()
        process.join()
        assert not (out / "result.json").exists(), "it was to be killed in mid-run"
    summary = run(config)
    expected, found = loss_curve(undisturbed), loss_curve(out)
    assert summary.steps == STEPS
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-5
    reference = json.loads((undisturbed / "result.json").read_text())
    assert summary.tokens == reference["tokens"]
    assert summary.acceptance_length == pytest.approx(reference["acceptance_length"], abs=1e-3)


def test_a_complete_run_rerun_returns_its_summary_at_once(tiny_store: Path, undisturbed: Path) -> None:
    before = (undisturbed / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run(settings(tiny_store, undisturbed)).steps == STEPS
    assert (undisturbed / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_another_setting_into_the_same_run_is_refused_by_name(tiny_store: Path, undisturbed: Path) -> None:
    with pytest.raises(TrainError, match=r"begun with lr = 0.002, now it is 0.1"):
        run(settings(tiny_store, undisturbed, lr=0.1))


def as_of_format_1(source: Path, path: Path) -> Path:
    """Copy a run and describe it as earlier versions did."""
    out = Path(shutil.copytree(source, path))
    record = json.loads((out / "run.json").read_text())
    assert record.pop("format") == 2
    del record["settings"]["step_tokens"]
    record["settings"]["batch_tokens"] = 1024
    (out / "run.json").write_text(json.dumps(record | {"batches_per_step": 1}))
    return out


def test_a_complete_run_of_an_earlier_version_gives_its_summary(
    tmp_path: Path, tiny_store: Path, undisturbed: Path
) -> None:
    out = as_of_format_1(undisturbed, tmp_path / "run")
    expected = json.loads((out / "result.json").read_text())
    assert dataclasses.asdict(run(settings(tiny_store, out))) == expected


def test_a_begun_run_of_an_earlier_version_is_refused_and_can_be_exported(
    tmp_path: Path, tiny_store: Path, undisturbed: Path
) -> None:
    out = as_of_format_1(undisturbed, tmp_path / "run")
    (out / "result.json").unlink()
    with pytest.raises(TrainError, match=r"begun by an earlier version .* cannot be resumed. Export it") as caught:
        run(settings(tiny_store, out))
    assert "\n" not in str(caught.value)
    assert export(out, tmp_path / "draft", checkpoint="last").tensors == 18


def test_a_run_of_a_later_version_is_refused(tmp_path: Path, tiny_store: Path, undisturbed: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"format": 3}))
    with pytest.raises(TrainError, match="of format 3, and this version of specx knows those up to 2"):
        run(settings(tiny_store, out))


def test_training_learns(undisturbed: Path) -> None:
    curve = loss_curve(undisturbed)
    assert sum(curve[s] for s in range(STEPS - 4, STEPS + 1)) < 0.9 * sum(curve[s] for s in range(1, 6))


def test_neither_training_nor_export_needs_the_target(tmp_path: Path, target: Path, regen: Path) -> None:
    from specx.extract.config import ExtractConfig
    from specx.extract.pipeline import run as extract

    lent = Path(shutil.copytree(target, tmp_path / "target"))
    store, out = tmp_path / "store", tmp_path / "run"
    extract(ExtractConfig(target=str(lent), data=(str(regen / "dev.parquet"),), store=str(store), limit=12))
    shutil.rmtree(lent)
    run(settings(store, out, max_steps=3, holdout_fraction=0.0))
    assert export(out, tmp_path / "draft").tensors == 18


def test_sequences_added_later_do_not_change_a_run_in_progress(
    tmp_path: Path, target: Path, regen: Path, store_copy: Path
) -> None:
    from specx.extract.config import ExtractConfig
    from specx.extract.pipeline import run as extract

    out = tmp_path / "run"
    config = settings(store_copy, out, max_steps=6)
    run(config)
    first = loss_curve(out)
    # As if the run had been killed behind its last checkpoint but one, and the store had grown since.
    (out / "result.json").unlink()
    (out / "checkpoints" / "last.ckpt").unlink()
    extract(ExtractConfig(target=str(target), data=(str(regen / "dev.parquet"),), store=str(store_copy), limit=8))
    run(config)
    assert loss_curve(out) == first


def test_a_store_of_another_target_is_refused_on_resume(tmp_path: Path, store_copy: Path) -> None:
    out = tmp_path / "run"
    run(settings(store_copy, out, max_steps=2))
    info = FeatureStore.open(store_copy).info
    other = info.model_copy(update={"target": info.target.model_copy(update={"weights_hash": "0" * 64})})
    (store_copy / "dataset.json").write_bytes(other.sealed().to_bytes())
    with pytest.raises(TrainError, match="another target"):
        run(settings(store_copy, out, max_steps=2))


def test_the_full_vocabulary_is_exported_without_a_mapping(tmp_path: Path, tiny_store: Path) -> None:
    run(settings(tiny_store, tmp_path / "run", max_steps=2, draft_vocab_size=10_000))
    assert export(tmp_path / "run", tmp_path / "draft").tensors == 16


def test_a_short_run_without_a_holdout_sums_up_its_last_batch_also_when_rerun(tmp_path: Path, tiny_store: Path) -> None:
    config = settings(tiny_store, tmp_path / "run", max_steps=2, holdout_fraction=0.0, log_every=10)
    first = run(config)
    # As if it had been killed behind the last checkpoint.
    (tmp_path / "run" / "result.json").unlink()
    again = run(config)
    assert (again.steps, again.tokens, again.loss) == (first.steps, first.tokens, first.loss)


def test_interrupted_training_saves_its_step_and_the_rerun_goes_on_from_there(
    tmp_path: Path, tiny_store: Path, undisturbed: Path
) -> None:
    out, run_file = tmp_path / "run", tmp_path / "run.yaml"
    config = settings(tiny_store, out, checkpoint_every=1000)
    run_file.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    command = [*SPECX, "train", "--config", str(run_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(loss_curve(out)) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 130, stderr
    saved = len(loss_curve(out))
    assert 5 <= saved < STEPS
    assert f"stopped and saved at step {saved}" in stderr.splitlines()[-1]
    assert run(config).steps == STEPS
    found, expected = loss_curve(out), loss_curve(undisturbed)
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-5


def test_mixed_precision_follows_the_float32_loss(tmp_path: Path, tiny_store: Path, undisturbed: Path) -> None:
    run(settings(tiny_store, tmp_path / "run", max_steps=10, precision="bf16-mixed"))
    # The schedule depends on the length of the run, so only the first steps are the same.
    found, expected = loss_curve(tmp_path / "run"), loss_curve(undisturbed)
    assert found[1] == pytest.approx(expected[1], rel=2e-3)
