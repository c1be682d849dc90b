"""Stores, runs and exports of commit 6409e4a are read by every later version, and train to the same numbers."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from specx.storage.ops.verify import require_sound, verify
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.export.write import export
from specx.train.families.load import load_draft
from specx.train.pipeline import run

from ..conftest import MadeOnce
from .golden import CODECS, CURVES, RUNS, batches, curve, processor, settings, train, unpack

Specx = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="session")
def golden(made_once: MadeOnce) -> Path:
    """The unpacked files, shared by all tests: copy what a test changes."""

    def build(path: Path) -> None:
        path.mkdir()
        unpack(path)

    return made_once("golden", build)


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(CURVES.read_text())
    return values


@pytest.fixture(scope="session")
def results(golden: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((golden / "results.json").read_text())
    return values


def last_line(result: CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_is_whole_and_read_as_every_other_codec_has_it(golden: Path, codec: str) -> None:
    store = FeatureStore.open(str(golden / codec))
    require_sound(store.root, verify(store))
    ours, plain = FeatureReader(store), FeatureReader(FeatureStore.open(str(golden / "none")))
    assert len(ours.catalogue) == len(plain.catalogue) == 40
    for sequence in (0, 17, 39):
        found, wanted = ours.features(sequence), plain.features(sequence)
        assert (found.input_ids == wanted.input_ids).all()
        assert (found.loss_mask == wanted.loss_mask).all()
        a, b = (
            torch.from_numpy(np.ascontiguousarray(each.aux_hidden)).view(torch.bfloat16).float()
            for each in (found, wanted)
        )
        allowed = {"int8": 0.02, "fp8": 0.05}.get(codec, 0.0)
        assert (a - b).norm() <= allowed * b.norm()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_exported_to_the_bytes_it_was(golden: Path, name: str, tmp_path: Path) -> None:
    for kept in golden.glob(f"draft-{name}-*"):
        form = "speculators" if kept.name.endswith("speculators") else "native"
        export(golden / f"run-{name}", tmp_path / form, format=form)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / form / file).read_bytes() == (kept / file).read_bytes(), file


@pytest.mark.parametrize("name", RUNS)
def test_an_export_is_read_back(golden: Path, name: str) -> None:
    for kept in golden.glob(f"draft-{name}-*"):
        exported = load_draft(kept, torch.float32)
        assert exported.draft.spec.method == ("eagle1" if name == "eagle1" else "eagle3")
        assert exported.draft.spec.hidden_size == 32


def test_an_export_is_estimated_as_it_was(golden: Path, results: dict[str, Any], specx: Specx) -> None:
    found = last_line(
        specx(
            "evaluate", "--draft", golden / "draft-specdrift-eagle3", "--store", golden / "lossless", "--split", "all",
            "--json",
        )
    )  # fmt: skip
    assert found.keys() == results["estimate"].keys()
    for key, value in results["estimate"].items():
        if key != "seconds":
            assert found[key] == pytest.approx(value, abs=2e-3), key


def test_a_run_is_drawn(golden: Path, specx: Specx, tmp_path: Path) -> None:
    runs = [golden / f"run-{name}" for name in RUNS]
    result = specx("report", *runs, golden / "lossless", "--out", tmp_path / "report.html", "--json")
    assert last_line(result)["runs"] == 3


@pytest.mark.parametrize("name", RUNS)
def test_a_complete_run_gives_its_summary_again(golden: Path, name: str) -> None:
    kept = json.loads((golden / f"run-{name}" / "result.json").read_text())
    assert kept["steps"] == 20
    assert dataclasses.asdict(run(settings(golden, name, golden / f"run-{name}"))) == kept


@pytest.mark.parametrize("name", RUNS)
def test_an_epoch_has_the_same_batches(golden: Path, name: str, expected: dict[str, Any]) -> None:
    assert batches(golden, name) == expected["batches"][name]


@pytest.mark.parametrize("name", RUNS)
def test_training_comes_to_the_same_losses(golden: Path, name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    train(golden, name, tmp_path / "run")
    found, wanted = curve(tmp_path / "run"), expected["losses"][name]
    assert len(found) == len(wanted) == 20
    is_same_machine = processor() == expected["processor"]
    tolerance = 1e-6 if is_same_machine else 1e-3
    assert all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(found, wanted, strict=True))
    if is_same_machine:
        export(tmp_path / "run", tmp_path / "draft")
        weights = (tmp_path / "draft" / "model.safetensors").read_bytes()
        assert xxhash.xxh128_hexdigest(weights) == expected["exports"][name]
