"""Recipes by name: defaults for the settings of a run.

``eagle3``     arXiv 2503.01840 and its training code: the residual stream is fed back, no norm before ``fc``,
               7 steps of test-time training, learning rate 5e-5.
``specdrift``  arXiv 2605.09992 (EAGLE 3.1): the normed state is fed back, each auxiliary state is normed. Its batch of
               16 sequences of 4096 tokens is ``batch_tokens`` = 65 536 packed tokens.
``eagle1``     arXiv 2401.15077 and its training code: features first, uniform noise on them, learning rate 3e-5.
"""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "eagle3": {
        "method": "eagle3",
        "norm_output": False,
        "fc_norm": False,
        "ttt_steps": 7,
        "lr": 5e-5,
        "gradient_clip": 0.5,
    },
    "specdrift": {
        "method": "eagle3",
        "norm_output": True,
        "fc_norm": True,
        "ttt_steps": 4,
        "lr": 1e-4,
        "warmup_fraction": 0.2,
        "epochs": 2,
        "max_length": 4096,
        "batch_tokens": 16 * 4096,
    },
    "eagle1": {
        "method": "eagle1",
        "norm_output": False,
        "fc_norm": False,
        "ttt_steps": 1,
        "lr": 3e-5,
        "gradient_clip": 0.5,
        "feature_noise": 0.1,
    },
}


def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings over those of the preset that they name, or that their method implies."""
    name = settings.get("preset") or ("eagle1" if settings.get("method") == "eagle1" else None)
    # An unknown name is refused with the setting's other errors.
    return dict(PRESETS.get(name, {}) if isinstance(name, str) else {}) | dict(settings)
