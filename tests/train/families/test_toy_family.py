"""A family from outside passes the contract, through the entry point of an installed package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specx.train.families.registry import ENTRY_POINTS

pytestmark = pytest.mark.long

CONTRACT = Path(__file__).parent / "test_contract.py"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> dict[str, str]:
    """An environment in which the package of the toy is installed."""
    site = tmp_path_factory.mktemp("site")
    installed = site / "specx_toy-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: specx-toy\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\ntoy = specx.tests.train.families.toy_family:TOY\n")
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    # Under xdist, or the store would be made once more.
    shared = {"SPECX_TESTS_SHARED": str(tiny_store.parents[1])}
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {
        "PYTHONPATH": path,
        **shared,
    }


def call(environment: dict[str, str], *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


def test_the_toy_passes_the_contract(environment: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = call(
        environment, "-m", "pytest", "-q", "-k", "toy", f"--basetemp={tmp_path / 'base'}", f"--junitxml={report}",
        "-p", "no:cacheprovider", CONTRACT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    written = report.read_text()
    assert 'failures="0"' in written
    assert written.count("<testcase") == CONTRACT.read_text().count("\ndef test_")


def test_the_toy_is_trained_exported_and_evaluated_from_the_command_line(
    environment: dict[str, str], tiny_store: Path, target: Path, regen: Path, tmp_path: Path
) -> None:
    run, draft = tmp_path / "run", tmp_path / "draft"
    shown = call(environment, "-m", "specx", "train", "--help")
    assert "--anchor-share" in shown.stdout
    for arguments in (
        ["train", "--store", tiny_store, "--out", run, "--preset", "toy", "--heads", 2, "--max-steps", 4],
        ["export", "--run", run, "--out", draft],
    ):
        done = call(environment, "-m", "specx", *arguments)
        assert done.returncode == 0, done.stderr
    assert "no engine serves a draft of method toy" in done.stderr
    decode = ["evaluate", "--draft", draft, "--target", target, "--data", regen / "dev.parquet", "--limit", 2]
    decode += ["--num-speculative-tokens", 2, "--max-new-tokens", 8, "--json", "--engine"]
    done = call(environment, "-m", "specx", *decode, "transformers")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["lossless"]
    refused = call(environment, "-m", "specx", *decode, "vllm")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "vLLM does not serve drafts of this family" in refused.stderr


def test_without_its_package_a_toy_is_refused_in_one_line(tiny_store: Path, tmp_path: Path) -> None:
    done = call(dict(os.environ), "-m", "specx", "train", "--store", tiny_store, "--out", tmp_path, "--method", "toy")
    assert done.returncode in (1, 2)
    assert "eagle3" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_entry_point_that_is_no_family_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "specx_wrong-1.0.dist-info"
    wrong.mkdir()
    (wrong / "METADATA").write_text("Metadata-Version: 2.1\nName: specx-wrong\nVersion: 1.0\n")
    (wrong / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nwrong = json:dumps\n")
    path = os.pathsep.join((str(tmp_path), environment["PYTHONPATH"]))
    done = call(environment | {"PYTHONPATH": path}, "-m", "specx", "train", "--store", "a", "--out", "b")
    assert done.returncode == 1
    assert "entry point wrong = json:dumps" in done.stderr
    assert "Traceback" not in done.stderr
