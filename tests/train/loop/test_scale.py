"""Steps of several batches, on several devices: one loss, one curve, whoever computes which part of it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.data.batch import Batch, read_batch
from specx.train.data.corpus import Corpus
from specx.train.data.datamodule import FeatureData
from specx.train.data.packing import BatchPlan
from specx.train.errors import TrainError
from specx.train.families.eagle3.draft import Eagle3Draft
from specx.train.families.eagle3.objective import Objective, unrolled_loss
from specx.train.families.registry import family
from specx.train.loop.checkpoint import load_checkpoint
from specx.train.loop.run_directory import RunDirectory
from specx.train.loop.trainer import _module
from specx.train.loss.anchors import count_labels
from specx.train.loss.metrics import StepCounts, decayed_weights, total_loss
from specx.train.loss.target_distribution import Vocabulary
from specx.train.opening import open_corpus
from specx.train.pipeline import run

from ...program import SPECX
from ..conftest import anchored

pytestmark = pytest.mark.long

STEPS = 16
Curve = Callable[..., dict[int, float]]


def settings(store: Path, out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": STEPS,
        "step_tokens": 1024,
        "batch_tokens": 512,
        "draft_vocab_size": 512,
        "lr": 2e-3,
        "ttt_steps": 2,
        "checkpoint_every": 4,
        "validate_every": 8,
        "log_every": 1,
    }
    # None leaves a setting at its default.
    return TrainConfig.model_validate({key: value for key, value in (base | changes).items() if value is not None})


def start(config: TrainConfig, run_file: Path) -> subprocess.Popen[str]:
    """Run the command line in a process group of its own."""
    run_file.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    command = [*SPECX, "train", "--config", str(run_file), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def living(group: int) -> list[str]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def wait_for_the_end_of(group: int) -> None:
    deadline = time.monotonic() + 30
    while living(group):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    assert sorted(one) == sorted(other) == list(range(1, STEPS + 1))
    return max(abs(one[step] - other[step]) for step in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A run of one process, several batches a step."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(settings(tiny_store, out))
    return out


def planned(config: TrainConfig, corpus: Corpus, devices: int = 1) -> FeatureData:
    return FeatureData(config, corpus, devices, anchors=family(config.method).anchors(config.draft))


def labels_of(batch: Batch, t2d: torch.Tensor) -> torch.Tensor:
    return count_labels(batch, batch.anchors, t2d)


def test_labels_are_counted_as_the_loss_counts_them(
    draft: Eagle3Draft, embed_tokens: torch.Tensor, vocabulary: Vocabulary, batch: Batch
) -> None:
    objective = Objective(loss="cross_entropy", step_weights=decayed_weights(3, 0.8))
    batch = anchored(batch, 3)
    _, counts = unrolled_loss(draft, embed_tokens, batch, vocabulary, objective, dtype=torch.float32)
    assert labels_of(batch, vocabulary.t2d).tolist() == [float(step.labels) for step in counts]


def test_losses_of_the_batches_of_a_step_add_up_to_the_mean_over_all_labels() -> None:
    def counts(*pairs: tuple[float, float]) -> list[StepCounts]:
        zero = torch.zeros(())
        rest = dict.fromkeys(
            ("anchors", "greedy_hits", "text_hits", "greedy_prefixes", "text_prefixes", "overlap"), zero
        )
        return [StepCounts(loss=torch.tensor(loss), labels=torch.tensor(n), **rest) for loss, n in pairs]

    one, other = counts((30.0, 10.0), (8.0, 4.0)), counts((5.0, 1.0), (0.0, 0.0))
    labels = torch.tensor([11.0, 4.0])
    weights = decayed_weights(2, 0.5)
    total = total_loss(one, weights, labels) + total_loss(other, weights, labels)
    assert total.item() == pytest.approx((35 / 11) * 2 / 3 + (8 / 4) / 3)


def test_a_window_knows_its_labels_before_its_first_batch_and_reads_little_for_it(tiny_store: Path) -> None:
    corpus = Corpus([FeatureReader(FeatureStore.open(tiny_store))], (1, 3, 5))
    data = planned(settings(tiny_store, tiny_store, step_tokens=2048, max_steps=3), corpus)
    n = data.batches_per_step
    assert data.steps == 3
    assert n >= 4
    known = torch.zeros(2048, dtype=torch.bool)
    known[::2] = True
    data.known = known.numpy()
    batches = list(data.train_dataloader())
    assert len(batches) == 3 * n
    for first in range(0, 3 * n, n):
        expected = sum(labels_of(batch, known) for batch in batches[first : first + n])
        for batch in batches[first : first + n]:
            assert torch.equal(batch.window_labels, expected)
    small = read_batch(corpus, data.step_plans(1)[0], corpus.length.tolist(), labels_only=True)
    assert small.aux_hidden.numel() == small.last_hidden.numel() == 0


def test_the_gradient_of_a_step_is_that_of_all_its_batches_together(
    tmp_path: Path, tiny_store: Path, alone: Path, loss_curve: Curve
) -> None:
    begun = shutil.copytree(alone, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    config, directory = settings(tiny_store, begun), RunDirectory(begun)
    corpus = open_corpus([FeatureStore.open(tiny_store)], directory.record().stores, directory.spec().boundaries)
    data = planned(config, corpus)
    module = _module(config, directory, corpus, data.steps, "32-true")
    draw = family(config.method).anchors(config.draft).draw
    batches = [read_batch(corpus, plan, data.lengths, draw_anchors=draw) for plan in data.step_plans(1)]
    assert len(batches) > 1
    labels = sum(labels_of(batch, module.vocabulary.t2d) for batch in batches)
    loss = sum(module(batch, labels)[0] for batch in batches)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in module.parameters()])
    assert loss_curve(alone)[1] == pytest.approx(loss.item(), rel=1e-6)
    assert loss_curve(alone, "gradient_norm")[1] == pytest.approx(norm.item(), rel=1e-5)


def test_a_batch_without_labels_has_a_gradient_for_every_weight(tiny_store: Path, alone: Path) -> None:
    """Or the processes would wait for each other's."""
    config, directory = settings(tiny_store, alone), RunDirectory(alone)
    corpus = open_corpus([FeatureStore.open(tiny_store)], directory.record().stores, directory.spec().boundaries)
    module = _module(config, directory, corpus, STEPS, "32-true")
    draw = family(config.method).anchors(config.draft).draw
    for plan in (BatchPlan((3, 4)), BatchPlan(())):
        batch = read_batch(corpus, plan, corpus.length.tolist())
        batch = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
        loss, _ = module(dataclasses.replace(batch, anchors=draw(batch)))
        module.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and not weight.grad.any() for weight in module.parameters())


def test_two_processes_have_the_curve_of_one_and_what_is_killed_goes_on_alone(
    tmp_path: Path, tiny_store: Path, alone: Path, loss_curve: Curve
) -> None:
    out = tmp_path / "run"
    config = settings(tiny_store, out, devices=2)
    process = start(config, tmp_path / "run.json")
    while process.poll() is None and max(loss_curve(out), default=0) < 7:
        time.sleep(0.02)
    # Only the one that waits for the others: none may outlive it.
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    wait_for_the_end_of(process.pid)
    process.communicate()
    saved = load_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"]
    assert 0 < saved < STEPS
    together = loss_curve(out)
    expected = loss_curve(alone)
    assert max(abs(together[step] - expected[step]) for step in together) <= 1e-5
    summary = run(settings(tiny_store, out, devices=1))
    assert summary.steps == STEPS
    assert difference(loss_curve(out), expected) <= 1e-4
    reference = json.loads((alone / "result.json").read_text())
    assert summary.tokens == reference["tokens"]
    assert summary.acceptance_length == pytest.approx(reference["acceptance_length"], abs=1e-3)


def test_a_run_of_one_process_goes_on_in_two_and_its_summary_is_printed_once(
    tmp_path: Path, tiny_store: Path, alone: Path, loss_curve: Curve
) -> None:
    out = tmp_path / "run"
    first = start(settings(tiny_store, out), tmp_path / "first.json")
    while first.poll() is None and max(loss_curve(out), default=0) < 6:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    with start(settings(tiny_store, out, devices=2), tmp_path / "second.json") as second:
        stdout, stderr = second.communicate(timeout=300)
    assert second.returncode == 0, stderr
    summary = json.loads(stdout)
    reference = json.loads((alone / "result.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (STEPS, reference["tokens"])
    # Held-out sequences are shared between the processes, none twice and none left out.
    assert summary["acceptance_length"] == pytest.approx(reference["acceptance_length"], abs=1e-3)
    assert difference(loss_curve(out), loss_curve(alone)) <= 1e-4


def test_interrupted_processes_stop_and_save_together(
    tmp_path: Path, tiny_store: Path, alone: Path, loss_curve: Curve
) -> None:
    out = tmp_path / "run"
    process = start(settings(tiny_store, out, devices=2, checkpoint_every=1000), tmp_path / "run.json")
    while process.poll() is None and max(loss_curve(out), default=0) < 3:
        time.sleep(0.02)
    # A terminal sends ^C to all of them.
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    saved = load_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"]
    assert saved == max(loss_curve(out))
    assert f"stopped and saved at step {saved}" in stderr


def test_a_process_that_meets_damage_ends_all_with_one_line(tmp_path: Path, store_copy: Path) -> None:
    for shard in store_copy.glob("parts/*/aux_hidden/c/0/0/0"):
        content = bytearray(shard.read_bytes())
        content[1000] ^= 1
        shard.write_bytes(content)
    process = start(settings(store_copy, tmp_path / "run", devices=2), tmp_path / "run.json")
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (1, "")
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("specx: ")]) == 1
    assert "checksum of chunk" in stderr.splitlines()[-1]
    wait_for_the_end_of(process.pid)


def test_other_devices_or_memory_are_the_same_run_and_other_steps_are_not(tiny_store: Path, alone: Path) -> None:
    summary = json.loads((alone / "result.json").read_text())
    assert run(settings(tiny_store, alone, batch_tokens=4096, devices=2)).loss == summary["loss"]
    with pytest.raises(TrainError, match="begun with step_tokens = 1024, now it is 2048"):
        run(settings(tiny_store, alone, step_tokens=2048))


def test_a_process_may_have_another_number_of_batches_a_step_on_other_devices(tiny_store: Path) -> None:
    """As the runs above that go on with other devices do: a place in a run is a number of steps."""
    corpus = Corpus([FeatureReader(FeatureStore.open(tiny_store))], (1, 3, 5))
    one, two = (FeatureData(settings(tiny_store, tiny_store), corpus, devices) for devices in (1, 2))
    assert one.accumulated > two.accumulated > 1
    assert one.plan == two.plan


RECIPE = {"max_steps": None, "epochs": 1, "step_tokens": 8192, "batch_tokens": 2048, "validate_every": 1000}
"""An epoch of a few steps, the last one partly filled."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Callable[..., Path]:
    """Train a preset on some devices."""

    def trained(preset: str, devices: int, **changes: object) -> Path:
        out = tmp_path_factory.mktemp(preset) / "run"
        run(settings(tiny_store, out, **RECIPE | {"preset": preset, "devices": devices} | changes))
        return out

    return trained


def require_equal_curves(curves: list[dict[int, float]]) -> None:
    first, *others = curves
    assert len(first) > 3
    for other in others:
        assert sorted(other) == sorted(first)
        assert all(other[step] == pytest.approx(first[step], rel=1e-5) for step in first)


def test_specdrift_has_the_same_steps_and_curve_on_one_two_and_eight_processes(
    recipe: Callable[..., Path], loss_curve: Curve
) -> None:
    runs = [recipe("specdrift", devices, ttt_steps=4, lr=1e-3) for devices in (1, 2, 8)]
    require_equal_curves([loss_curve(out) for out in runs])
    summaries = [json.loads((out / "result.json").read_text()) for out in runs]
    assert len({(summary["steps"], summary["tokens"]) for summary in summaries}) == 1


def test_the_noise_of_eagle1_is_the_same_on_one_and_two_processes(
    recipe: Callable[..., Path], loss_curve: Curve
) -> None:
    def trained(devices: int, **changes: object) -> Path:
        return recipe("eagle1", devices, ttt_steps=None, draft_vocab_size=None, **changes)

    curves = [loss_curve(trained(devices)) for devices in (1, 2)]
    require_equal_curves(curves)
    plain = loss_curve(trained(1, feature_noise=0.0))
    assert abs(plain[1] - curves[0][1]) > 1e-4 * plain[1]


def test_fsdp_without_a_gpu_is_refused(tmp_path: Path, tiny_store: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(TrainError, match="fsdp needs CUDA devices, found none"):
        run(settings(tiny_store, tmp_path / "run", strategy="fsdp"))


@pytest.mark.gpu
def test_sharded_training_has_the_curve_of_one_process_and_goes_on_as_such(
    tmp_path: Path, tiny_store: Path, loss_curve: Curve
) -> None:
    devices = min(2, torch.cuda.device_count())
    plain = settings(tiny_store, tmp_path / "plain", precision="32-true")
    run(plain)
    out = tmp_path / "sharded"
    run(settings(tiny_store, out, precision="32-true", strategy="fsdp", devices=devices))
    assert difference(loss_curve(out), loss_curve(tmp_path / "plain")) <= 1e-4
    (out / "result.json").unlink()
    assert run(settings(tiny_store, out, precision="32-true")).steps == STEPS
