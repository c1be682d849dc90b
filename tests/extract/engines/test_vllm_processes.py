"""vLLM's own processes: they end with the run however that ends, and what they cannot do is told in one line."""

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import ExtractSummary, run
from specx.storage.ops.verify import verify
from specx.storage.store import FeatureStore

from ...program import SPECX

pytestmark = pytest.mark.long

ROWS = 60
DUPLICATES = 7
SETTINGS = {
    "engine": "vllm",
    "tokens_per_part": 1000,
    # So slow that much is left to do when the first unit is committed.
    "engine_options": {"max_num_batched_tokens": 64, "max_num_seqs": 4},
}

Start = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def start(target: Path, regen: Path, tmp_path: Path) -> Iterator[Start]:
    """Begin the same run again and again, as a session of its own, as on a terminal."""
    rows = pq.read_table(regen / "train.parquet", columns=["input_ids", "loss_mask"]).slice(0, ROWS).to_pylist()
    data, run_file = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:DUPLICATES]]))
    run_file.write_text(json.dumps(SETTINGS))
    begun: list[subprocess.Popen[str]] = []

    def begin(store: Path) -> subprocess.Popen[str]:
        options = ["--target", target, "--data", data, "--store", store, "--config", run_file, "--json"]
        command = [*SPECX, "extract", *options]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        begun.append(process)
        return process

    yield begin
    for process in begun:
        for pid in session(process):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def session(process: subprocess.Popen[str], name: str = "") -> list[int]:
    """Return the living processes of a session, those of a name."""
    found = []
    for directory in Path("/proc").iterdir():
        try:
            # After the name in brackets: state, parent, group, session.
            state, _, _, number = (directory / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (directory / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if int(number) == process.pid and state != "Z" and name in command:
            found.append(int(directory.name))
    return found


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)


def wait_for_commit(store: Path, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: any(store.glob("commits/u*.json")), process)


def assert_nothing_runs(process: subprocess.Popen[str], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while left := session(process):
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.1)


def committed(store: Path) -> list[str]:
    opened = FeatureStore.open(store)
    assert verify(opened).problems == []
    return [identifier for record in opened.records.values() for identifier in record.sequences.ids]


def our_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("specx: ")]


def finish_by_transformers(target: Path, store: Path) -> ExtractSummary:
    """The rest by the other engine, which loads sooner."""
    data = (str(store.parent / "rows.jsonl"),)
    return run(ExtractConfig(target=str(target), data=data, store=str(store), engine="transformers"))


def test_interrupt_of_all_processes_at_once_keeps_what_is_committed_and_leaves_none_behind(
    start: Start, target: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = start(store)
    wait_for_commit(store, process)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr[-3000:]
    assert stdout == ""
    assert "Traceback" not in stderr
    kept = committed(store)
    assert 0 < len(kept) < ROWS
    (line,) = [line for line in stderr.splitlines() if "interrupted" in line]
    assert line == f"{store}: interrupted; {len(kept)} sequences are committed, rerun to go on"
    assert_nothing_runs(process)
    finish_by_transformers(target, store)
    assert committed(store)[: len(kept)] == kept
    assert len(set(committed(store))) == len(committed(store)) == ROWS


def test_killed_run_leaves_no_process_behind_and_the_rerun_completes(
    start: Start, target: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = start(store)
    wait_for_commit(store, process)
    assert session(process, "EngineCore")
    process.kill()
    assert_nothing_runs(process)
    process.communicate()
    kept = committed(store)
    assert 0 < len(kept) < ROWS
    summary = finish_by_transformers(target, store)
    counts = (summary.sequences, summary.reused, summary.rejected)
    assert counts == (ROWS - len(kept), len(kept) + DUPLICATES, 0)
    assert committed(store)[: len(kept)] == kept
    assert len(set(committed(store))) == len(committed(store)) == ROWS


def test_disk_that_fills_up_in_vllm_s_process_is_one_line(start: Start, target: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = start(store)
    wait_for_commit(store, process)
    # No file of the writing process may grow beyond a size from here on, as on a full disk.
    (worker,) = session(process, "VLLM::Worker")
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (10_000, 10_000))
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (1, ""), stderr[-3000:]
    assert "Traceback" not in stderr
    (line,) = our_lines(stderr)
    assert line.startswith(f"specx: {store}: file too large while writing. What was finished before is kept")
    assert "rerun the same command" in line
    assert_nothing_runs(process)
    kept = committed(store)
    assert 0 < len(kept) < ROWS
    finish_by_transformers(target, store)
    assert len(set(committed(store))) == len(committed(store)) == ROWS
