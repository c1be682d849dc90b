"""One store for many data sets and many runs: the target runs once over each sequence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specx.extract.config import ExtractConfig
from specx.extract.data.samples import Sample
from specx.extract.engines.transformers_engine import TransformersEngine
from specx.extract.pipeline import run as extract
from specx.storage.catalog.views import load_views
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.loop.run_directory import RunDirectory
from specx.train.pipeline import run as train

A, B = range(20), range(8, 28)
"""Rows of the answers; 12 of 20, 60 %, are in both."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, regen: Path) -> dict[str, Path]:
    """Two data sets that share sequences, the second with a mask and categories of its own."""
    folder = tmp_path_factory.mktemp("data")
    rows = [row for row in pq.read_table(regen / "train.parquet").to_pylist() if row.get("status", "ok") == "ok"]
    rows = [{key: row[key] for key in ("input_ids", "loss_mask")} for row in rows[:28]]
    paths = {}
    for name, numbers in (("a", A), ("b", B)):
        chosen = [rows[i] | {"category": name} for i in numbers]
        if name == "b":
            # The first half of each answer is not trained on.
            for row in chosen:
                mask = np.asarray(row["loss_mask"])
                mask[: len(mask) // 2] = 0
                row["loss_mask"] = mask.tolist()
        paths[name] = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(chosen), paths[name])
    return paths


@pytest.fixture(scope="module")
def runs() -> list[bytes]:
    """Sequences that the target was run over."""
    return []


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, target: Path, data: dict[str, Path], runs: list[bytes]
) -> FeatureStore:
    """Both data sets in one store, each with its view."""
    path = tmp_path_factory.mktemp("reuse") / "store"
    add = TransformersEngine.add

    def counted(self: TransformersEngine, sample: Sample) -> None:
        runs.append(sample.input_ids.tobytes())
        add(self, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "add", counted)
        for name in ("a", "b"):
            extract(configured(target, data[name], path, view=name))
    return FeatureStore.open(path)


def configured(target: Path, data: Path, store: Path, **changes: Any) -> ExtractConfig:
    return ExtractConfig(target=str(target), data=(str(data),), store=str(store), engine="transformers", **changes)


def trained(store: FeatureStore, out: Path, **changes: Any) -> RunDirectory:
    values = {"max_steps": 2, "step_tokens": 1024, "draft_vocab_size": 256, "holdout_fraction": 0.0} | changes
    train(TrainConfig(store=store.root, out=str(out), **values))
    return RunDirectory(out)


def test_the_target_runs_only_over_what_is_missing(
    store: FeatureStore, target: Path, data: dict[str, Path], runs: list[bytes]
) -> None:
    assert len(runs) == len(set(runs)) == 28, "20 of the first and 8, 40 %, of the second"
    told = extract(configured(target, data["b"], Path(store.root), view="b"))
    assert (told.sequences, told.reused, told.rejected) == (0, 20, 0)
    assert len(load_views(store.place, ["a"])) == len(load_views(store.place, ["b"])) == 20


def test_each_data_set_keeps_its_masks_and_categories(store: FeatureStore) -> None:
    readers = {name: FeatureReader(store, view=load_views(store.place, [name])) for name in ("a", "b")}
    for name, reader in readers.items():
        assert set(reader.catalogue.category) == {name}
        assert len(reader.catalogue) == 20
    shared = {bytes(each): i for i, each in enumerate(readers["a"].catalogue.ids)}
    both = [(shared[bytes(each)], i) for i, each in enumerate(readers["b"].catalogue.ids) if bytes(each) in shared]
    assert len(both) == 12
    for in_a, in_b in both:
        one, other = readers["a"].features(in_a), readers["b"].features(in_b)
        assert np.array_equal(one.aux_hidden, other.aux_hidden)
        half = len(one.loss_mask) // 2
        assert not other.loss_mask[:half].any()
        assert np.array_equal(one.loss_mask[half:], other.loss_mask[half:])


def test_a_longer_sequence_is_told_apart_from_its_prefix(
    store: FeatureStore, target: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    row = pq.read_table(data["a"]).to_pylist()[0]
    shorter = {key: row[key][:-5] for key in ("input_ids", "loss_mask")}
    path = tmp_path / "shorter.parquet"
    pq.write_table(pa.Table.from_pylist([shorter, row]), path)
    told = extract(configured(target, path, tmp_path / "store"))
    assert (told.sequences, told.reused) == (2, 0)
    told = extract(configured(target, path, tmp_path / "store"))
    assert (told.sequences, told.reused) == (0, 2)


@pytest.mark.parametrize(
    ("views", "sequences"), [((), 28), (("a",), 20), (("b",), 20), (("a", "b"), 28)], ids=["all", "a", "b", "both"]
)
def test_every_view_is_trained_on_without_the_target(
    store: FeatureStore, tmp_path: Path, views: tuple[str, ...], sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[int] = []
    init = FeatureReader.__init__

    def noting(self: FeatureReader, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        met.append(len(self.catalogue))

    monkeypatch.setattr(FeatureReader, "__init__", noting)
    trained(store, tmp_path / "run", view=views)
    assert met == [sequences]


@pytest.mark.parametrize(
    "changes",
    [
        {"boundaries": (3,)},
        {"boundaries": (1, 5)},
        {"max_length": 50},
        {"draft_vocab_size": 64},
        {"view": ("mask.parquet",)},
    ],
    ids=["one_boundary", "two_boundaries", "shorter", "draft_vocabulary", "mask"],
)
def test_other_experiments_need_no_extraction(
    store: FeatureStore, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sequences = store.catalogue()
    masks = [np.ones(length, np.uint8).tolist() for length in sequences.length[:5]]
    ids = pa.array([bytes(each) for each in sequences.ids[:5]], pa.binary(16))
    pq.write_table(pa.table({"id": ids, "loss_mask": masks}), "mask.parquet")
    directory = trained(store, tmp_path / "run", **changes)
    spec = directory.spec()
    assert spec.boundaries == changes.get("boundaries", store.info.boundaries)
    assert spec.draft_vocab_size == changes.get("draft_vocab_size", 256)


def test_a_view_that_grows_does_not_change_a_run_that_is_resumed(
    store: FeatureStore, tmp_path: Path, target: Path, data: dict[str, Path]
) -> None:
    run = trained(store, tmp_path / "run", view=("a",))
    files = run.record().stores[0].view_files
    assert [file.split("/")[1] for file in files] == ["a"]
    (tmp_path / "run" / "result.json").unlink()
    extract(configured(target, data["b"], Path(store.root), view="a"))
    assert len(load_views(store.place, ["a"])) == 28
    assert trained(store, tmp_path / "run", view=("a",)).record().stores[0].view_files == files


def test_a_store_without_last_hidden_states_trains_on_the_top_k(
    tmp_path: Path, target: Path, data: dict[str, Path]
) -> None:
    for codec in ("lossless", "int8"):
        path = tmp_path / codec
        extract(configured(target, data["a"], path, last_hidden=False, codec=codec))
        store = FeatureStore.open(path)
        out = tmp_path / f"run-{codec}"
        trained(store, out, max_steps=10)
        result = json.loads((out / "result.json").read_text())
        assert 0 < result["loss"] < 10


def test_views_and_the_rest_are_there_on_the_command_line(
    specx: Callable[..., Any], store: FeatureStore, tmp_path: Path
) -> None:
    def last_line(*arguments: str | Path) -> dict[str, Any]:
        result = specx("store", *arguments, "--json")
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return found

    selected = last_line("select", store.root, "--as", "short", "--view", "b", "--max-length", "10000", "--limit", "5")
    assert selected["sequences"] == 5
    smaller = tmp_path / "smaller"
    pruned = last_line("prune", store.root, "--into", smaller, "--boundaries", "3", "--no-last-hidden")
    assert pruned["sequences"] == 28
    merged = last_line("merge", store.root, "--into", tmp_path / "merged", "--link")
    assert merged["sequences"] == 28
    assert set(last_line("info", tmp_path / "merged")["views"]) >= {"a", "b", "short"}
    assert last_line("gc", smaller, "--older-than", "0", "--dry-run")["removed"] == []
    assert last_line("verify", smaller)["problems"] == []
    (broken,) = (tmp_path / "merged" / "commits").glob("u000000.json")
    broken.write_bytes(broken.read_bytes()[:-9])
    assert specx("store", "verify", tmp_path / "merged").returncode == 1
    assert specx("extract", "--target", "x", "--data", "y", "--store", tmp_path / "merged").returncode == 1
    dropped = last_line("verify", tmp_path / "merged", "--drop-bad")
    assert list(dropped["damaged_units"]) == ["0"]
    assert last_line("verify", tmp_path / "merged")["problems"] == []
