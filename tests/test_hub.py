"""Targets by name: what every command takes as ``--target``."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specx.extract.config import ExtractConfig, PlanConfig
from specx.extract.pipeline import run as extract
from specx.extract.plan import plan
from specx.extract.regenerate.config import RegenerateConfig
from specx.extract.regenerate.pipeline import run as regenerate
from specx.hub import TargetError, locate_target
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.evaluate.prompts import read_prompts
from specx.train.evaluate.summary import EvaluateSummary
from specx.train.export.rope_check import check_rope


@pytest.fixture
def hub(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the tiny target as org/tiny, and as org/bare without weights."""
    for name in ("tiny", "bare"):
        repository, revision = tmp_path / "hub" / f"models--org--{name}", "0" * 40
        shutil.copytree(target, repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
    (tmp_path / "hub" / "models--org--bare" / "snapshots" / revision / "model.safetensors").unlink()
    # The library has read HF_HUB_CACHE when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_directory_is_taken_as_it_is(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_target(target, weights=True) == target
    monkeypatch.chdir(target.parent)
    assert locate_target(target.name, weights=False) == target


def test_a_hub_id_is_the_snapshot_in_the_cache(hub: Path) -> None:
    found = locate_target("org/tiny", weights=True)
    assert found == hub / "models--org--tiny" / "snapshots" / ("0" * 40)


def test_evaluate_decodes_a_target_of_the_hub(hub: Path, exported_draft: Path, regen: Path) -> None:
    summary = evaluate(
        EvaluateConfig(
            draft=str(exported_draft),
            target="org/tiny",
            data=(str(regen / "dev.parquet"),),
            engine="transformers",
            limit=1,
            max_new_tokens=4,
        )
    )
    assert isinstance(summary, EvaluateSummary)
    assert summary.lossless is True


def test_evaluate_renders_prompts_with_the_template_of_a_target_of_the_hub(
    hub: Path, exported_draft: Path, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    settings = {"draft": str(exported_draft), "data": (str(tmp_path / "prompts.jsonl"),), "date": "2025-06-01"}
    ours = read_prompts(EvaluateConfig(target="org/bare", **settings))
    assert ours == read_prompts(EvaluateConfig(target=str(target), **settings))


def test_rope_check_needs_only_the_config_of_a_target_of_the_hub(hub: Path, exported_draft: Path) -> None:
    assert check_rope("org/bare", exported_draft).is_equal


def test_extract_takes_a_target_of_the_hub_and_asks_for_its_weights(hub: Path, regen: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": (str(regen / "dev.parquet"),), "store": str(tmp_path / "store"), "limit": 1}
    assert extract(ExtractConfig(target="org/tiny", **settings)).sequences == 1
    with pytest.raises(TargetError, match=r"no \*\.safetensors"):
        extract(ExtractConfig(target="org/bare", **settings))


@pytest.mark.parametrize("command", ["extract", "regenerate", "plan", "evaluate", "rope-check"])
def test_every_command_refuses_an_unknown_target_in_the_same_words(
    hub: Path, command: str, exported_draft: Path, regen: Path, tmp_path: Path
) -> None:
    name, data = "org/other", (str(regen / "dev.parquet"),)
    calls: dict[str, Callable[[], object]] = {
        "extract": lambda: extract(ExtractConfig(target=name, data=data, store=str(tmp_path / "store"))),
        "regenerate": lambda: regenerate(RegenerateConfig(target=name, data=data, out=str(tmp_path / "a.parquet"))),
        "plan": lambda: plan(PlanConfig(target=name, tokens=5)),
        "evaluate": lambda: evaluate(EvaluateConfig(target=name, data=data, draft=str(exported_draft))),
        "rope-check": lambda: check_rope(name, exported_draft),
    }
    with pytest.raises(TargetError, match=f"^{name}: neither a directory nor a model on the hub: "):
        calls[command]()


@pytest.mark.parametrize("name", ["/gone", "./gone", "~/gone", "gone"])
def test_a_missing_directory_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(TargetError, match=f"^{name}: no such directory. Give --target a model's directory or hub id"):
        locate_target(name, weights=True)
