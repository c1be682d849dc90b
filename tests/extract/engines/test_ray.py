"""Several engines over one store, in real Ray actors: nothing lost, nothing twice, whatever dies."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file, save_file

from specx.extract.config import ExtractConfig
from specx.extract.engines.base import EngineError
from specx.extract.engines.factory import open_engine
from specx.extract.engines.ray.worker import ExtractWorker
from specx.extract.pipeline import ExtractSummary, dataset_info, run
from specx.extract.target import open_target
from specx.hub import TargetError
from specx.storage.catalog.rejects import read_rejects
from specx.storage.errors import StoreError
from specx.storage.ops.verify import verify
from specx.storage.store import FeatureStore

from ...program import SPECX

pytestmark = pytest.mark.long

ROWS = 150
BAD_ROWS = 3
TOKEN, ROWS_WITH_TOKEN = 563, 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this process, which the runs share."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, regen: Path) -> Path:
    """Answers, and among them rows that are none."""
    rows = pq.read_table(regen / "train.parquet", columns=["input_ids", "loss_mask"]).slice(0, ROWS).to_pylist()
    for position in (10, 70, 140):
        rows.insert(position, {"input_ids": [1], "loss_mask": [1]})
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(target: Path, data: Path, store: Path, **changes: Any) -> ExtractConfig:
    values: dict[str, Any] = {"workers": 2, "tokens_per_part": 2000, **changes}
    return ExtractConfig(target=str(target), data=(str(data),), store=str(store), **values)


def with_nan(target: Path, path: Path) -> Path:
    """A target that gives nothing usable for sequences with one token."""
    shutil.copytree(target, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][TOKEN] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def writers(store: FeatureStore) -> list[int]:
    """Process ids in the order of commit."""
    store.refresh()
    return [int(store.records[unit].writer.rpartition(":")[2]) for unit in sorted(store.records)]


def require_whole(store: FeatureStore, summary: ExtractSummary, unusable: int = 0) -> None:
    """Every sequence committed exactly once, every byte as it was written, every count right."""
    good = ROWS - unusable
    store.refresh()
    identifiers = [each for record in store.records.values() for each in record.sequences.ids]
    assert len(identifiers) == len(set(identifiers)) == good
    assert (summary.sequences, summary.reused, summary.rejected) == (good, 0, BAD_ROWS + unusable)
    assert summary.tokens == sum(sum(record.sequences.lengths) for record in store.records.values())
    assert verify(store).problems == []


def worker_processes(calling: str = "") -> list[int]:
    """Process ids of living workers below this process, of those only that run a method."""
    found, parents = [], {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command.startswith(f"ray::ExtractWorker{calling}"):
            found.append(int(folder.name))

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return [process for process in found if is_ours(process)]


def kill(process: int) -> None:
    # It may have ended by itself.
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def require_no_workers() -> None:
    """Ray ends a process soon after it was told to."""
    deadline = time.monotonic() + 20
    while worker_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert worker_processes() == []


def killer(store: str, killed: list[int], *, kills: int) -> Callable[[threading.Event], None]:
    """Give the work of killing workers, each at a random moment after it has committed something."""
    generator = random.Random(kills)

    def work(over: threading.Event) -> None:
        commits = 0
        while len(killed) < kills and not over.wait(0.05):
            try:
                found = writers(FeatureStore.open(store))
            except StoreError:
                continue
            living = worker_processes()
            if able := [process for process in found[commits:] if process in living]:
                over.wait(generator.uniform(0.0, 0.3))
                killed.append(generator.choice(able))
                kill(killed[-1])
                commits = len(found)

    return work


def extract(target: Path, data: Path, store: str | Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the command with two workers, in a session of its own."""
    run_file = folder / "run.yaml"
    run_file.write_text("tokens_per_part: 2000")
    # What killed workers leave in the temporary directory goes with the test's; Ray's own must have a short name.
    environment = {**os.environ, "TMPDIR": str(folder), "RAY_TMPDIR": tempfile.gettempdir()}
    given = ["--target", target, "--data", data, "--store", store, "--workers", "2", "--config", run_file, *options]
    command = [*SPECX, "extract", *map(str, given)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run something beside the block until that ends; it is told so by an event."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_two_workers_commit_every_sequence_once_and_both_write(
    cluster: None, tmp_path: Path, target: Path, data: Path
) -> None:
    summary = run(settings(target, data, tmp_path / "store"))
    store = FeatureStore.open(tmp_path / "store")
    require_whole(store, summary)
    assert len(set(writers(store))) == 2
    recorded = [reject.row for record in store.records.values() for reject in record.rejected]
    assert sorted(recorded) == [10, 70, 140]
    again = run(settings(target, data, tmp_path / "store"))
    assert (again.sequences, again.reused, again.rejected) == (0, ROWS, BAD_ROWS)


def test_what_killed_workers_had_not_committed_is_run_by_others(
    cluster: None, tmp_path: Path, target: Path, data: Path
) -> None:
    config = settings(with_nan(target, tmp_path / "target"), data, tmp_path / "store")
    killed: list[int] = []
    with meanwhile(killer(config.store, killed, kills=3)):
        summary = run(config)
    assert len(killed) == 3
    store = FeatureStore.open(config.store)
    unusable = [reject.row for reject in read_rejects(store.place) if reject.reason == "not_finite"]
    assert len(unusable) == len(set(unusable)) == ROWS_WITH_TOKEN
    require_whole(store, summary, ROWS_WITH_TOKEN)


def test_a_worker_killed_over_a_bad_network_to_s3_loses_nothing(
    tmp_path: Path, target: Path, data: Path, s3: str, s3_faults: Any
) -> None:
    store, killed = f"{s3}/features", []
    s3_faults.lose(0.05, seed=0)
    # A Ray of its own: this process has one without the way to this server.
    with meanwhile(killer(store, killed, kills=1)):
        process = extract(target, data, store, tmp_path, "--json")
        printed, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert len(killed) == 1
    assert s3_faults.lost > 0
    s3_faults.stop()
    (line,) = printed.splitlines()
    summary = ExtractSummary(**json.loads(line))
    require_whole(FeatureStore.open(store), summary)


def test_a_sample_that_kills_every_worker_ends_the_run_and_is_named(
    cluster: None, tmp_path: Path, target: Path, data: Path
) -> None:
    # It is a range of its own and takes seconds, so that no worker lives to run anything else.
    long = {"input_ids": [number % 2000 for number in range(4000)], "loss_mask": [0] + [1] * 3999}
    poisoned = tmp_path / "rows.jsonl"
    poisoned.write_text(json.dumps(long) + "\n" + data.read_text())

    def work(over: threading.Event) -> None:
        while not over.wait(0.05):
            for process in worker_processes(".run"):
                kill(process)

    config = settings(target, poisoned, tmp_path / "store", workers=1, ray_address="auto")
    with meanwhile(work), pytest.raises(EngineError, match=r"rows.jsonl: row 0: 3 workers died over this") as error:
        run(config)
    assert "\n" not in str(error.value)
    assert verify(FeatureStore.open(config.store)).problems == []
    require_no_workers()


def test_an_error_of_a_worker_is_the_line_it_would_be_without_ray(
    cluster: None, tmp_path: Path, target: Path, data: Path
) -> None:
    broken = tmp_path / "target"
    broken.mkdir()
    for file in target.iterdir():
        (broken / file.name).symlink_to(file)
    config = json.loads((target / "config.json").read_text())
    (broken / "config.json").unlink()
    (broken / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    with pytest.raises(TargetError, match="weights are missing or of another shape") as error:
        run(settings(broken, data, tmp_path / "store"))
    assert "\n" not in str(error.value)
    require_no_workers()


def test_a_node_that_does_not_see_the_store_is_told_so(tmp_path: Path, target: Path, data: Path) -> None:
    config = settings(target, data, tmp_path / "elsewhere", workers=1)
    worker = ExtractWorker(config, dataset_info(config, open_target(config.target)), threads=1)
    with pytest.raises(EngineError, match=r"no feature store here.*Every node of the Ray cluster must see the store"):
        worker.open()


def test_several_workers_without_ray_are_refused_in_one_line(
    tmp_path: Path, target: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened = settings(target, data, tmp_path / "store"), open_target(str(target))
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    for name in ("ray.engine", "ray.worker"):
        monkeypatch.delitem(sys.modules, f"specx.extract.engines.{name}")
    with pytest.raises(EngineError, match=r"several workers need Ray.*`pip install specx\[ray\]`"):
        open_engine(config, opened, dataset_info(config, opened))


def test_an_interrupt_keeps_what_is_committed_and_leaves_no_process(tmp_path: Path, target: Path, regen: Path) -> None:
    store = tmp_path / "store"
    process = extract(target, regen / "train.parquet", store, tmp_path)
    while len(list(store.glob("commits/u*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    # As a terminal does: to all processes of the group.
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    assert "Traceback" not in printed
    require_no_workers()
    opened = FeatureStore.open(store)
    assert len(opened.records) >= 2
    assert verify(opened).problems == []
