"""``specx rope-check``: whether a draft turns positions into the angles of its target, as trained and as served.

Shapes: R dimensions of a head that are rotated.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from ...hub import locate_target
from ..errors import TrainError
from ..families.base import DraftFamily
from ..families.checkpoint import CONFIG_FILE, ENGINES, Engine, layer_config
from ..families.load import load_spec, recognize
from ..families.registry import family
from ..families.targets import architecture_of
from ..rope.frequencies import Angles
from ..rope.rotary import RotaryEmbedding, draft_rope
from ..rope.served import served_angles
from .config import RopeCheckConfig

POSITIONS = (128, 1024, 4096, 16384, 131071)
"""Where angles are compared, as far as the target goes; its last position is added."""

_ROUNDING = 1e-6
"""Relative. Two ways to compute a frequency in float32 differ by less, two ropes by far more."""
_LAYER = "transformer_layer_config"
_RUN_FILE = "draft.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeCheck:
    """How the angles of a draft compare with the target's."""

    verdict: str
    """One line, beginning with equal or differs."""
    max_angle_error: float
    """Radians, not wrapped, the largest of all readers and positions."""
    concentration: dict[str, float]
    """Factor on cos and sin: of the target, the draft as it is trained, and each engine that serves it."""
    angle_error: dict[str, dict[str, float]]
    """Radians from the target, by reader and position."""
    block: list[str]
    """What the draft's rope block has otherwise than specx would write it."""

    @property
    def is_equal(self) -> bool:
        return self.verdict.startswith("equal")

    def shown(self) -> dict[str, Any]:
        """Return it with a line for each reader, for people."""
        lines = asdict(self)
        del lines["angle_error"], lines["block"]
        lines |= {
            f"{reader}, rad": "  ".join(f"{position}: {error:.3g}" for position, error in errors.items())
            for reader, errors in self.angle_error.items()
        }
        return lines | {"block": "; ".join(self.block) or "as expected"}


def run(config: RopeCheckConfig) -> RopeCheck:
    """Compare the draft that the settings name with its target."""
    return check_rope(config.target, config.draft)


def check(config: RopeCheckConfig, result: RopeCheck) -> None:
    """Raise TrainError unless the angles are the target's."""
    require_equal(result, config.draft)


def check_rope(target: str | Path, draft: str | Path) -> RopeCheck:
    """Compare a draft with its target; ``draft`` is an exported one of any form, or a run's directory.

    ``target`` is a directory or hub id. Raises TargetError if it is neither, TrainError if target or draft cannot be
    read, or has a rope that no draft can have.
    """
    target_config = _target_config(locate_target(target, weights=False))
    config = _draft_config(Path(draft))
    layer = _layer(config, draft)
    expected = _target_angles(target_config, target)
    try:
        found = {"draft": _trained_angles(layer)}
        for engine in _engines(config, draft):
            found[engine] = served_angles(_layer(config, draft), engine)
    except (KeyError, ValueError) as error:
        raise TrainError(
            f"{draft}: the rope block cannot be computed with: {_line(error)}. Export it again."
        ) from error
    last = int(target_config.max_position_embeddings) - 1
    positions = [*(position for position in POSITIONS if position < last), last]
    errors = {
        reader: {str(position): position * _frequency_error(angles, expected) for position in positions}
        for reader, angles in found.items()
    }
    wrong = [reader for reader, angles in found.items() if not _is_same(angles, expected)]
    return RopeCheck(
        verdict=_verdict(wrong, errors, found, expected, last),
        max_angle_error=max(error for each in errors.values() for error in each.values()),
        concentration={reader: angles.concentration for reader, angles in {"target": expected, **found}.items()},
        angle_error=errors,
        block=_unexpected(layer, target_config, target),
    )


def require_equal(check: RopeCheck, draft: str | Path) -> None:
    """Raise TrainError unless the angles are the target's."""
    if not check.is_equal:
        hint = f" In its rope block {'; '.join(check.block)}." if check.block else ""
        raise TrainError(f"{draft}: {check.verdict}.{hint} Export with `specx export`, or train on this target.")


def _target_config(directory: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise TrainError(f"{directory}: no target here: {_line(error)}. Give its directory as --target.") from error
    assert isinstance(config, PretrainedConfig)
    return config


def _draft_config(directory: Path) -> dict[str, Any]:
    if (directory / _RUN_FILE).exists():
        spec = load_spec(directory / _RUN_FILE)
        _require_rotary(family(spec.method), directory)
        return layer_config(spec)
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        if not isinstance(config, dict) or not isinstance(config.get(_LAYER, {}), dict):
            raise ValueError("not an object of keys")
    except (OSError, ValueError) as error:
        raise TrainError(
            f"{directory / CONFIG_FILE}: not the config of a draft ({_line(error)}). Make one with `specx export`."
        ) from error
    return config


def _layer(config: Mapping[str, Any], draft: str | Path) -> LlamaConfig:
    """Return the draft's layer as transformers completes it, which engines begin with too."""
    try:
        return LlamaConfig(**config.get(_LAYER, config))
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise TrainError(f"{draft}: not the config of a draft: {_line(error)}. Export it again.") from error


def _engines(config: Mapping[str, Any], draft: str | Path) -> tuple[Engine, ...]:
    """Return those that load the draft at all."""
    found = recognize(config)
    if found is None:
        return ENGINES
    _require_rotary(found, draft)
    return found.checkpoint.served_by(config)


def _require_rotary(found: DraftFamily[Any, Any, Any], draft: str | Path) -> None:
    if not found.has_rotary:
        raise TrainError(f"{draft}: its draft family has no rotary position embedding; there are no angles to compare.")


def _target_angles(config: PretrainedConfig, target: str | Path) -> Angles:
    name, _ = architecture_of(config.to_dict(), str(target))
    prefix = name.removesuffix("ForCausalLM")
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    rotary = getattr(module, f"{prefix}RotaryEmbedding")(config)
    return Angles(inv_freq=rotary.inv_freq, concentration=float(rotary.attention_scaling))


def _trained_angles(layer: LlamaConfig) -> Angles:
    values = layer.to_dict()
    rotary = RotaryEmbedding(int(values["head_dim"]), values["rope_parameters"])
    return Angles(inv_freq=rotary.inv_freq, concentration=float(rotary.attention_scaling))


def _frequency_error(found: Angles, expected: Angles) -> float:
    """Return the largest difference, radians a position; a dimension that one of them does not turn has frequency 0."""
    both = torch.zeros(2, max(len(found.inv_freq), len(expected.inv_freq)), dtype=torch.float64)
    for row, angles in zip(both, (found, expected), strict=True):
        row[: len(angles.inv_freq)] = angles.inv_freq
    return float((both[0] - both[1]).abs().max())


def _is_same(found: Angles, expected: Angles) -> bool:
    if len(found.inv_freq) != len(expected.inv_freq):
        return False
    is_near = torch.isclose(found.inv_freq, expected.inv_freq, rtol=_ROUNDING, atol=0.0).all()
    return bool(is_near) and abs(found.concentration / expected.concentration - 1) <= _ROUNDING


def _verdict(
    wrong: list[str], errors: Mapping[str, Mapping[str, float]], found: Mapping[str, Angles], target: Angles, last: int
) -> str:
    if not wrong:
        return f"equal: {', '.join(found)} have the target's angles and concentration"
    return "differs from the target: " + "; ".join(
        f"{reader} by {errors[reader][str(last)]:.3g} rad at position {last}, concentration "
        f"{found[reader].concentration:.6g} against {target.concentration:.6g}"
        for reader in wrong
    )


def _unexpected(layer: LlamaConfig, target: PretrainedConfig, where: str | Path) -> list[str]:
    values = target.to_dict()
    architecture = architecture_of(values, str(where))[1]
    wanted = draft_rope(values["rope_parameters"], str(where), has_partial_rotary=architecture.has_partial_rotary)
    found: Mapping[str, Any] = layer.to_dict()["rope_parameters"]
    # Not for truncate, whose absence is worth saying.
    optional = {"beta_fast": 32.0, "beta_slow": 1.0}
    differing = [
        f"{key} is {found.get(key, 'missing')}, expected {value}"
        for key, value in wanted.items()
        if found.get(key, optional.get(key)) != value
    ]
    return differing + [f"{key} is {found[key]}, expected none" for key in sorted(set(found) - set(wanted))]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
