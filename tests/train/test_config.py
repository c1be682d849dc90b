"""Presets, and settings that exclude each other."""

from pathlib import Path
from typing import Any

import pytest

from specx.config import ConfigError, load_config
from specx.train.config import TrainConfig


def config(**settings: Any) -> TrainConfig:
    return load_config(TrainConfig, None, {"store": "store", "out": "out"} | settings)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("eagle3", {"norm_output": False, "fc_norm": False, "ttt_steps": 7, "lr": 5e-5}),
        (
            "specdrift",
            {"norm_output": True, "fc_norm": True, "lr": 1e-4, "warmup_fraction": 0.2, "epochs": 2, "ttt_steps": 4}
            | {"step_tokens": 65_536, "max_length": 4096, "final_lr_fraction": 0.0},
        ),
        ("eagle1", {"method": "eagle1", "feature_noise": 0.1, "lr": 3e-5}),
    ],
)
def test_a_preset_gives_the_defaults_of_its_recipe(preset: str, expected: dict[str, Any]) -> None:
    settings = config(preset=preset).flat()
    assert {key: settings[key] for key in expected} == expected


def test_run_file_and_options_override_a_preset(tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("preset: specdrift\nttt_steps: 5\nlr: 0.5\n")
    found = load_config(TrainConfig, run_file, {"store": "store", "out": "out", "lr": 0.25})
    assert (found.draft.ttt_steps, found.lr, found.warmup_fraction) == (5, 0.25, 0.2)


def test_the_method_eagle1_brings_its_preset() -> None:
    assert config(method="eagle1") == config(preset="eagle1").model_copy(update={"preset": None})


def test_resolved_settings_give_the_same_run_again() -> None:
    found = config(preset="specdrift", lr=0.5)
    assert TrainConfig.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "eagle4"}, "preset eagle4: no such recipe, expected one of eagle3, specdrift, eagle1"),
        ({"preset": "eagle3", "method": "eagle1"}, "preset eagle3 is a recipe of method eagle3, not of eagle1"),
        ({"method": "eagle4"}, "--method.*'eagle3', 'eagle1'"),
        ({"norm_before_fc": True}, "fc_norm and norm_before_fc exclude each other"),
        ({"sliding_window": 4, "ttt_steps": 4}, "sliding_window 4 must be above ttt_steps 4"),
        (
            {"preset": "eagle1", "sliding_window": 64},
            "unknown key; the keys are .*sliding_window is a key of eagle3",
        ),
        ({"method": "eagle1", "ttt_steps": 3}, r"\(ttt_steps\): unknown key; .*ttt_steps is a key of eagle3"),
        (
            {"method": "eagle3", "logit_loss_weight": 0.5},
            "logit_loss_weight is a key of eagle1",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
