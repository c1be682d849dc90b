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
from specx.train.errors import TrainError
from specx.train.families.eagle3.draft import Draft
from specx.train.families.eagle3.objective import (
    Objective,
    StepCounts,
    count_labels,
    evaluate,
    step_weights,
    total_loss,
)
from specx.train.loop.checkpoint import load_checkpoint
from specx.train.loop.run_directory import RunDirectory
from specx.train.loop.trainer import _module
from specx.train.loss.target_distribution import Vocabulary
from specx.train.pipeline import open_corpus, run

from ...program import SPECX

pytestmark = pytest.mark.long

STEPS = 16
Curve = Callable[..., dict[int, float]]


def settings(store: Path, out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": STEPS,
        "batch_tokens": 512,
        "batches_per_step": 2,
        "draft_vocab_size": 512,
        "lr": 2e-3,
        "ttt_steps": 2,
        "checkpoint_every": 4,
        "validate_every": 8,
        "log_every": 1,
    }
    return TrainConfig.model_validate(base | changes)


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
    """A run of one process, two batches a step."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(settings(tiny_store, out))
    return out


def test_labels_are_counted_as_the_loss_counts_them(
    draft: Draft, embed_tokens: torch.Tensor, vocabulary: Vocabulary, batch: Batch
) -> None:
    objective = Objective(loss="cross_entropy", step_weights=step_weights(3, 0.8))
    _, counts = evaluate(draft, embed_tokens, batch, vocabulary, objective, dtype=torch.float32)
    assert count_labels(batch, vocabulary.t2d, 3).tolist() == [float(step.labels) for step in counts]


def test_losses_of_the_batches_of_a_step_add_up_to_the_mean_over_all_labels() -> None:
    def counts(*pairs: tuple[float, float]) -> list[StepCounts]:
        zero = torch.zeros(())
        rest = dict.fromkeys(
            ("anchors", "greedy_hits", "text_hits", "greedy_prefixes", "text_prefixes", "overlap"), zero
        )
        return [StepCounts(loss=torch.tensor(loss), labels=torch.tensor(n), **rest) for loss, n in pairs]

    one, other = counts((30.0, 10.0), (8.0, 4.0)), counts((5.0, 1.0), (0.0, 0.0))
    labels = torch.tensor([11.0, 4.0])
    weights = step_weights(2, 0.5)
    total = total_loss(one, weights, labels) + total_loss(other, weights, labels)
    assert total.item() == pytest.approx((35 / 11) * 2 / 3 + (8 / 4) / 3)


def test_a_window_knows_its_labels_before_its_first_batch_and_reads_little_for_it(tiny_store: Path) -> None:
    corpus = Corpus([FeatureReader(FeatureStore.open(tiny_store))], (1, 3, 5))
    data = FeatureData(settings(tiny_store, tiny_store, batches_per_step=4, max_steps=3), corpus, 4)
    assert (data.steps, len(data.plans)) == (3, 12)
    known = torch.zeros(2048, dtype=torch.bool)
    known[::2] = True
    data.known = known.numpy()
    batches = list(data.train_dataloader())
    for first in range(0, 12, 4):
        expected = sum(count_labels(batch, known, 2) for batch in batches[first : first + 4])
        for batch in batches[first : first + 4]:
            assert torch.equal(batch.window_labels, expected)
    small = read_batch(corpus, data.plans[0], corpus.length.tolist(), labels_only=True)
    assert small.aux_hidden.numel() == small.last_hidden.numel() == 0


def test_the_gradient_of_a_step_is_that_of_all_its_batches_together(
    tmp_path: Path, tiny_store: Path, alone: Path, loss_curve: Curve
) -> None:
    begun = shutil.copytree(alone, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    config, directory = settings(tiny_store, begun), RunDirectory(begun)
    corpus = open_corpus([FeatureStore.open(tiny_store)], directory.record().stores, directory.spec().boundaries)
    data = FeatureData(config, corpus, 2)
    module = _module(config, directory, corpus, data.steps, "32-true")
    batches = [read_batch(corpus, plan, corpus.length.tolist()) for plan in data.step_plans(1)]
    labels = sum(count_labels(batch, module.vocabulary.t2d, config.ttt_steps) for batch in batches)
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
    for plan in ([[3, 4]], [[]]):
        batch = read_batch(corpus, plan, corpus.length.tolist())
        loss, _ = module(dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)))
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
    summary = run(settings(tiny_store, out, devices=1, batches_per_step=None))
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


def test_devices_that_cannot_share_a_step_evenly_are_refused(tmp_path: Path, tiny_store: Path) -> None:
    with pytest.raises(TrainError, match="3 batches, which 2 devices cannot share evenly"):
        run(settings(tiny_store, tmp_path / "run", batches_per_step=3, devices=2))
    assert not (tmp_path / "run").exists()


def test_another_number_of_batches_in_a_step_is_another_run(tiny_store: Path, alone: Path) -> None:
    with pytest.raises(TrainError, match="begun with batches_per_step = 2, now it is 4"):
        run(settings(tiny_store, alone, batches_per_step=4))


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
