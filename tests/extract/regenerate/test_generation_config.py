"""How a target samples: the run's own settings, else its generation config, else plainly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specx.extract.regenerate.config import RegenerateConfig
from specx.extract.regenerate.generation_config import answer_settings, stop_ids
from specx.extract.target import Target, open_target
from specx.hub import TargetError


@pytest.fixture
def copied(target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(target, tmp_path / "target"))


def opened(directory: Path, **generation: Any) -> Target:
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return open_target(str(directory))


def sampling(target: Target, **settings: Any) -> tuple[float, float, int]:
    config = RegenerateConfig(target=str(target.path), data=("d",), out="o.parquet", **settings)
    found = answer_settings(config, target, "2026-01-02")
    return found.temperature, found.top_p, found.top_k


def test_a_target_that_names_no_sampling_is_sampled_plainly(copied: Path) -> None:
    assert sampling(opened(copied)) == (1.0, 1.0, 0)
    assert sampling(opened(copied, temperature=None, top_k=None)) == (1.0, 1.0, 0)
    (copied / "generation_config.json").unlink()
    assert sampling(open_target(str(copied))) == (1.0, 1.0, 0)


def test_a_targets_own_sampling_holds_where_the_run_names_none(copied: Path) -> None:
    target = opened(copied, temperature=0.6, top_p=0.95, top_k=20)
    assert sampling(target) == (0.6, 0.95, 20)
    assert sampling(target, temperature=0, top_k=0) == (0.0, 0.95, 0)


def test_every_end_token_of_the_target_ends_an_answer(copied: Path) -> None:
    ends = json.loads((copied / "generation_config.json").read_text())["eos_token_id"]
    assert stop_ids(open_target(str(copied))) == tuple(ends)
    assert stop_ids(opened(copied, eos_token_id=7)) == (7,)


def test_an_unusable_generation_config_is_one_clear_line(copied: Path) -> None:
    with pytest.raises(TargetError, match=r"temperature 'hot', expected a number"):
        sampling(opened(copied, temperature="hot"))
    with pytest.raises(TargetError, match=r"eos_token_id is None, expected a token id or several"):
        stop_ids(opened(copied, eos_token_id=None))
    (copied / "generation_config.json").write_text("{")
    with pytest.raises(TargetError, match=r"not JSON"):
        sampling(open_target(str(copied)))
