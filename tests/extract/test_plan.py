"""What a run will write is foretold from a config and some rows, and refused where it cannot fit."""

import gzip
import json
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from specx import SpecxError
from specx.extract.config import ExtractConfig, PlanConfig
from specx.extract.data.row_count import Count, count
from specx.extract.data.samples import DataError, Sample, SampleReader
from specx.extract.plan import PlanError, RunEstimate, expect, free_space, plan, require_room
from specx.extract.target import open_target
from specx.hub import TargetError
from specx.storage.ops.info import summary
from specx.storage.reader import FeatureReader
from specx.storage.schema import Origin
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

from ..program import SPECX

Specx = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def bare(target: Path, tmp_path: Path) -> Path:
    """The tiny target's config and nothing else."""
    directory = tmp_path / "bare"
    directory.mkdir()
    (directory / "config.json").write_bytes((target / "config.json").read_bytes())
    return directory


def configured(target: Path, *data: Path | str, **settings: Any) -> ExtractConfig:
    return ExtractConfig(target=str(target), data=tuple(map(str, data)), store="s3://bucket/store", **settings)


def planned(target: Path, **settings: Any) -> dict[str, Any]:
    return plan(PlanConfig(target=str(target), **settings))


def counted(config: ExtractConfig, sample_rows: int, **options: bool) -> Count:
    found = count(config, open_target(config.target, weights=False), sample_rows=sample_rows, **options)
    assert found is not None
    return found


def lengths_read(config: ExtractConfig) -> list[int]:
    """Return the lengths of what a run with this config would run through the target."""
    rows = SampleReader(config, open_target(config.target, weights=False))
    return [len(row.input_ids) for row in rows if isinstance(row, Sample)]


def expected(config: ExtractConfig) -> RunEstimate:
    found = expect(config, open_target(config.target))
    assert found is not None
    return found


def write_lines(path: Path, count: int, length: int = 40) -> Path:
    """Write rows of about ``length`` random token ids."""
    rng = np.random.default_rng(0)
    lengths = length + rng.integers(0, 7, count)
    rows = ({"input_ids": rng.integers(0, 2048, n).tolist(), "loss_mask": [1] * n} for n in lengths.tolist())
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, 1) if path.suffix == ".gz" else text)
    return path


def test_plan_of_a_run_is_within_a_tenth_of_its_store(tiny_store: Path, target: Path, regen: Path) -> None:
    found = summary(FeatureStore.open(tiny_store))
    foretold = planned(target, data=(str(regen / "train.parquet"),), limit=120, tokens_per_part=10_000)
    assert [foretold[key] for key in ("sequences", "tokens", "parts")] == [
        found[key] for key in ("sequences", "tokens", "parts")
    ]
    assert foretold["bytes"] == pytest.approx(found["bytes"], rel=0.1)
    assert foretold["bytes_per_token"] == pytest.approx(found["bytes_per_token"], rel=0.1)
    for name, on_disk in found["bytes_by_array"].items():
        assert foretold["bytes_by_array"][name] == pytest.approx(on_disk, rel=0.15), name
    files = [path for path in tiny_store.rglob("*") if path.is_file()]
    assert foretold["files"] == sum(path.parent != tiny_store / "target" for path in files)
    head = tiny_store / "target" / "head.safetensors"
    assert foretold["target_bytes"] == pytest.approx(head.stat().st_size, rel=0.001)


@pytest.mark.parametrize(("codec", "tolerance"), [("lossless", 0.1), ("none", 0.01)])
def test_plan_of_parts_of_the_usual_size_is_near_the_store(
    tiny_store: Path, target: Path, tmp_path: Path, codec: str, tolerance: float
) -> None:
    reader = FeatureReader(FeatureStore.open(tiny_store))
    info = reader.store.info.model_copy(update={"codec": codec})
    store = FeatureStore.create(tmp_path / "store", info)
    with FeatureWriter(store, tokens_per_part=24_576) as writer:
        for number in range(len(reader.catalogue)):
            writer.add(reader.features(number), Origin(source="rows.jsonl", row=number))
    found = summary(store)
    foretold = planned(target, tokens=found["tokens"], sequences=found["sequences"], codec=codec)
    assert foretold["parts"] == found["parts"]
    assert foretold["bytes"] == pytest.approx(found["bytes"], rel=tolerance)
    assert foretold["files"] == pytest.approx(sum(path.is_file() for path in (tmp_path / "store").rglob("*")), rel=0.02)


def test_plan_needs_no_file_but_the_config(bare: Path, regen: Path) -> None:
    assert planned(bare, tokens=10**9, tokens_per_s=1000.0)["hours"] == 277.78
    # Recorded token ids need no tokenizer either.
    assert planned(bare, data=(str(regen / "dev.parquet"),))["sequences"] == 100


def test_plan_takes_a_hub_id_whose_weights_were_never_fetched(bare: Path, tmp_path: Path) -> None:
    repository, revision = tmp_path / "hub" / "models--org--name", "0" * 40
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (bare / "config.json").rename(snapshot / "config.json")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)

    def plan_for(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        # The library reads the variable as it is imported.
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
        command = [*SPECX, "store", "plan", "--target", name, "--tokens", "1000", *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    result = plan_for("org/name", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] == 1000
    result = plan_for("org/other")
    assert result.returncode == 1
    assert result.stderr.startswith("specx: org/other: neither a directory nor a model on the hub: ")
    assert len(result.stderr.splitlines()) == 1


def test_targets_whose_config_is_no_use_are_refused(bare: Path) -> None:
    (bare / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="unknown architecture none, expected one of GptOss"):
        planned(bare, tokens=1000)
    (bare / "config.json").unlink()
    with pytest.raises(TargetError, match=r"config\.json is missing"):
        planned(bare, tokens=1000)


def test_settings_that_the_run_would_refuse_are_refused(bare: Path) -> None:
    with pytest.raises(TargetError, match="top_k 4096 is larger than the vocabulary, 2048"):
        planned(bare, tokens=1000, top_k=4096)
    with pytest.raises(TargetError, match="boundary 6 of 6 blocks"):
        planned(bare, tokens=1000, boundaries=(6,))


@pytest.mark.parametrize("settings", [{}, {"tokens": 5, "data": ("rows.jsonl",)}])
def test_plan_needs_tokens_or_data(bare: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="either --tokens or --data"):
        planned(bare, **settings)


def test_sequences_of_data_cannot_be_given(bare: Path, regen: Path) -> None:
    with pytest.raises(PlanError, match="goes with --tokens"):
        planned(bare, data=(str(regen / "dev.parquet"),), sequences=5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"limit": 150},
        {"shard": (1, 3)},
        {"limit": 151, "shard": (1, 4)},
        {"max_length": 200},
        {"max_length": 200, "too_long": "truncate"},
    ],
)
def test_small_data_are_counted_as_the_run_reads_them(target: Path, regen: Path, settings: dict[str, Any]) -> None:
    config = configured(target, regen / "dev.parquet", regen / "conversations.jsonl", **settings)
    found = counted(config, 400)
    assert found.is_exact
    assert found.basis == f"counted in all {found.rows} rows"
    assert found.lengths.tolist() == lengths_read(config)
    assert (found.sequences, found.tokens) == (len(found.lengths), sum(found.lengths))


def test_all_recorded_lengths_are_counted_where_asked_for(target: Path, regen: Path) -> None:
    for settings in ({}, {"max_length": 250}, {"limit": 1999, "shard": (2, 3)}):
        config = configured(target, regen / "train.parquet", **settings)
        found = counted(config, 10, whole_bytes=1 << 30)
        assert found.is_exact
        assert found.lengths.tolist() == lengths_read(config)


def test_rows_with_gaps_among_their_ids_are_looked_at_one_by_one(target: Path, regen: Path, tmp_path: Path) -> None:
    table = pq.read_table(regen / "dev.parquet")
    rows = table.select(["input_ids", "loss_mask", "messages"]).to_pylist()
    rows[3] |= {"input_ids": None, "loss_mask": None}
    path = tmp_path / "gaps.parquet"
    pq.write_table(type(table).from_pylist(rows), path)
    found = counted(configured(target, path), 100, whole_bytes=1 << 30)
    assert found.lengths.tolist() == lengths_read(configured(target, path))


def test_large_data_are_estimated_from_their_first_rows(target: Path, regen: Path) -> None:
    config = configured(target, regen / "train.parquet", limit=2000)
    found, true = counted(config, 300), lengths_read(config)
    assert (found.rows, found.rows_seen, found.sequences) == (2000, 300, 2000)
    assert found.basis == "estimated from 300 of about 2,000 rows"
    assert found.tokens == pytest.approx(sum(true), rel=0.05)
    third = counted(configured(target, regen / "train.parquet", limit=2000, shard=(0, 4)), 300)
    assert (third.rows, third.rows_seen) == (500, 75)
    assert third.tokens == pytest.approx(found.tokens / 4, rel=0.001)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines_of_a_large_file_are_not_counted_one_by_one(target: Path, tmp_path: Path, name: str) -> None:
    found = counted(configured(target, write_lines(tmp_path / name, 20_000)), 500)
    assert found.rows_seen == 500
    assert found.rows == pytest.approx(20_000, rel=0.02 if name == "rows.jsonl" else 0.1)


def test_an_array_of_rows_is_counted(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}] * 30))
    assert counted(configured(target, path), 10).tokens == 90


def test_some_of_many_files_stand_for_all(target: Path, tmp_path: Path) -> None:
    for number in range(40):
        write_lines(tmp_path / f"{number:02d}.jsonl", 50, length=40 + number)
    config = configured(target, tmp_path)
    found = counted(config, 60)
    assert (found.rows, found.rows_seen, found.sequences) == (2000, 8 * 50, 2000)
    assert found.tokens == pytest.approx(sum(lengths_read(config)), rel=0.02)


def test_rejected_rows_take_no_room(target: Path, tmp_path: Path) -> None:
    good, bad = {"input_ids": [5] * 10, "loss_mask": [1] * 10}, {"input_ids": [5] * 10, "loss_mask": [0] * 10}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, bad] * 500))
    found = counted(configured(target, path), 100)
    assert (found.sequences, found.tokens) == (found.rows // 2, found.rows * 5)


def test_splits_have_no_plan_without_a_limit(
    target: Path, regen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "rows.parquet").write_bytes((regen / "dev.parquet").read_bytes())
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: chat\n    path: rows.parquet\n---\n"
    )
    data = f"{directory}:chat"
    with caplog.at_level(logging.INFO, logger="specx"):
        assert expect(configured(target, data), open_target(str(target))) is None
    assert caplog.messages == ["plan: none, as the number of rows is unknown"]
    with pytest.raises(PlanError, match=r"the number of rows is unknown\. Give --limit, or --tokens"):
        planned(target, data=(data,))
    assert planned(target, data=(data,), limit=80)["sequences"] == 80


def test_damaged_data_are_left_to_the_run_but_not_to_the_plan(
    target: Path, regen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(write_lines(tmp_path / "whole.jsonl.gz", 5000).read_bytes()[:300])
    with caplog.at_level(logging.INFO, logger="specx"):
        assert expect(configured(target, path), open_target(str(target))) is None
    assert caplog.messages == []
    with pytest.raises(DataError, match="cannot be read"):
        planned(target, data=(str(path),))
    with pytest.raises(DataError, match="no such file"):
        planned(target, data=(str(tmp_path / "typo.parquet"),))


def test_workers_end_with_a_part_each(target: Path, regen: Path) -> None:
    data = (str(regen / "dev.parquet"),)
    assert [planned(target, data=data, workers=workers)["parts"] for workers in (1, 4)] == [1, 4]


def test_one_line_tells_the_size_and_the_room(
    target: Path, regen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = expected(configured(target, regen / "train.parquet", limit=600))
    with caplog.at_level(logging.INFO, logger="specx"):
        require_room(str(tmp_path), found, force=False, free_bytes=40_200_000_000)
        require_room("s3://bucket/store", found, force=False)
    line = f"plan: about 600 sequences, {found.store.tokens / 1000:.0f}k tokens, {found.bytes / 1e6:.0f} MB in 6 parts"
    assert caplog.messages == [f"{line}; 40.2 GB free", line]


def test_a_store_that_cannot_fit_is_refused_unless_forced(target: Path, regen: Path, tmp_path: Path) -> None:
    found, store = expected(configured(target, regen / "dev.parquet")), str(tmp_path / "store")
    with pytest.raises(SpecxError, match="Free some space, use another --store or --codec, or pass --force") as error:
        require_room(store, found, force=False, free_bytes=2_000_000)
    assert str(error.value).startswith(f"{store}: about ")
    assert "counted in all 100 rows) and 2.0 MB are free" in str(error.value)
    require_room(store, found, force=True, free_bytes=2_000_000)
    require_room(store, found, force=False, free_bytes=found.bytes)
    # Only what the store lacks has to fit.
    require_room(store, found, force=False, free_bytes=2_000_000, stored_bytes=found.bytes - 2_000_000)


def test_free_space_is_that_of_the_disk_the_store_will_be_on(tmp_path: Path) -> None:
    assert free_space("s3://bucket/store") is None
    there, not_yet = free_space(str(tmp_path)), free_space(str(tmp_path / "a" / "b"))
    assert there is not None
    assert not_yet == pytest.approx(there, rel=0.05)


def test_the_command_prints_the_plan(specx: Specx, bare: Path, tmp_path: Path) -> None:
    arguments = ("store", "plan", "--target", bare, "--tokens", 100_000, "--sequences", 50, "--boundaries", "1,2")
    result = specx(*arguments, "--codec", "none", "--top-k", 8, "--tokens-per-s", 500, "--store", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    foretold = json.loads(result.stdout)
    assert (foretold["tokens"], foretold["sequences"], foretold["hours"]) == (100_000, 50, 0.06)
    assert foretold["raw_bytes_by_array"]["aux_hidden"] == 100_000 * 2 * 128 * 2
    assert foretold["free_bytes"] > 0
    assert specx("store", "plan", "--target", bare, "--tokens", 0).returncode == 1
