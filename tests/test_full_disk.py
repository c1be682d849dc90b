"""A disk that fills up costs the unit in progress and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run
from specx.storage.ops.verify import verify
from specx.storage.store import FeatureStore


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(target: Path, data: Path, store: Path, **settings: Any) -> ExtractConfig:
    return ExtractConfig(target=str(target), data=(str(data),), store=str(store), **settings)


def extract_limited(file_bytes: int, *options: str | Path) -> str:
    """Return the one line that extraction fails with where no file may grow beyond a size, as on a full disk."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes},) * 2)"
    command = [sys.executable, "-c", f"{limit}\nfrom specx.cli import main; main()", "extract", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("specx: ")] == lines[-1:]
    return lines[-1]


def test_full_disk_keeps_what_was_committed_and_the_rerun_goes_on(target: Path, tmp_path: Path) -> None:
    short = [{"input_ids": [number, *range(5, 305)], "loss_mask": [0] + [1] * 300} for number in range(8)]
    long = {"input_ids": [9] * 2600, "loss_mask": [0] + [1] * 2599}
    data, store = write(tmp_path / "rows.jsonl", [*short, long]), tmp_path / "store"
    settings = {"codec": "none", "tokens_per_part": 1000}
    run_file = tmp_path / "run.yaml"
    run_file.write_text(json.dumps(settings))
    line = extract_limited(1_500_000, "--target", target, "--data", data, "--store", store, "--config", run_file)
    assert line.startswith(f"specx: {store}: file too large while writing. What was finished before is kept")
    assert "rerun the same command" in line
    kept = len(FeatureStore.open(store).catalogue())
    assert kept >= 4
    assert verify(FeatureStore.open(store)).problems == []
    summary = run(configured(target, data, store, **settings))
    assert (summary.sequences, summary.reused, summary.rejected) == (9 - kept, kept, 0)
    whole = verify(FeatureStore.open(store))
    assert (whole.problems, whole.unreferenced, whole.sequences) == ([], [], 9)


def test_disk_too_full_for_the_head_of_the_target_is_one_line(target: Path, tmp_path: Path) -> None:
    data, store = write(tmp_path / "rows.jsonl", [{"input_ids": [5, 6], "loss_mask": [0, 1]}]), tmp_path / "store"
    line = extract_limited(300_000, "--target", target, "--data", data, "--store", store)
    assert line.startswith(f"specx: {store}: ")
    assert "too large" in line
    assert run(configured(target, data, store)).sequences == 1
