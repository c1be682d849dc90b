"""``specx evaluate`` from the command line: both engines judge alike."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specx.train.config import TrainConfig
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.export import export
from specx.train.pipeline import run as train

KEYS = {
    "acceptance_length",
    "per_position",
    "by_category",
    "by_context",
    "lossless",
    "tokens_per_s",
    "baseline_tokens_per_s",
    "requests",
    "verifications",
}


Summary = dict[str, Any]


@pytest.fixture(scope="module")
def summaries(
    specx: Callable[..., subprocess.CompletedProcess[str]], target: Path, regen: Path, exported_draft: Path
) -> dict[str, Summary]:
    """The same prompts by both engines."""
    options = ["--draft", exported_draft, "--target", target, "--data", regen / "dev.parquet", "--limit", "8"]
    found = {}
    for engine in ("vllm", "transformers"):
        finished = specx("evaluate", *options, "--engine", engine, "--max-new-tokens", "64", "--json")
        assert finished.returncode == 0, finished.stderr[-3000:]
        found[engine] = json.loads(finished.stdout.splitlines()[-1])
    return found


@pytest.fixture(params=["vllm", "transformers"])
def summary(request: pytest.FixtureRequest, summaries: dict[str, Summary]) -> Summary:
    return summaries[request.param]


def test_the_summary_has_the_keys_of_the_contract(summary: Summary) -> None:
    assert set(summary) == KEYS


def test_greedy_output_is_the_target_s_own(summary: Summary) -> None:
    assert summary["lossless"] is True


def test_a_trained_draft_is_accepted_well_above_chance(summary: Summary) -> None:
    assert summary["acceptance_length"] > 1.5
    shares = summary["per_position"]
    assert len(shares) == 3
    assert shares[0] > shares[1] > shares[2] > 0
    assert summary["acceptance_length"] == pytest.approx(1 + sum(shares), abs=1e-3)


def test_both_engines_find_the_same_acceptance_length(summaries: dict[str, Summary]) -> None:
    lengths = [found["acceptance_length"] for found in summaries.values()]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)


def test_an_eagle1_draft_is_decoded_by_the_chain_without_changing_the_output(
    tmp_path: Path, target: Path, regen: Path, tiny_store: Path
) -> None:
    settings = {
        "store": str(tiny_store),
        "out": str(tmp_path / "run"),
        "max_steps": 40,
        "batch_tokens": 1024,
        "lr": 3e-3,
    }
    train(TrainConfig.model_validate({"preset": "eagle1", "warmup_fraction": 0.0, **settings}))
    assert export(tmp_path / "run", tmp_path / "draft", engine="vllm").engines == ["vllm"]
    decoding = {"draft": str(tmp_path / "draft"), "target": str(target), "data": (str(regen / "dev.parquet"),)}
    summary = evaluate(EvaluateConfig(**decoding, engine="transformers", limit=4, max_new_tokens=48))
    assert summary.lossless is True
    assert summary.acceptance_length > 1.2
