"""The rotary angles that vLLM and SGLang build from a draft's config, by their own rules and not by transformers'.

vllm     0.32, ``model_executor/layers/rotary_embedding``; the tests hold it against the real one
sglang   0.5.23, ``srt/layers/rotary_embedding`` and ``srt/models/llama.py``, as read: it does not import without a GPU

Both take the block as transformers' config class completes it: a missing theta is 10000, a missing
``original_max_position_embeddings`` the ``max_position_embeddings``, and one that stands beside the block overrides
it. Both then read a missing ``truncate`` as true. For the concentration they read different keys.

Shapes: R dimensions of a head that are rotated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from .forms import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Angles:
    """What a rotary embedding comes to: position times frequency, and a factor on cos and sin."""

    inv_freq: torch.Tensor
    """(R/2,) float32, radians a position"""
    concentration: float


def served_angles(config: LlamaConfig, engine: Engine) -> Angles:
    """Return what an engine builds; ``config`` is the draft's layer.

    Raises ValueError for a rope type that is not one of a draft's, KeyError for a missing key.
    """
    # Both do so once more when the config is read: a key beside the block then counts.
    config.standardize_rope_params()  # type: ignore[no-untyped-call]
    rope: Mapping[str, Any] = config.to_dict()["rope_parameters"]
    rotated = _rotated(config, rope, engine)
    plain = 1.0 / _powers(rope["rope_theta"], rotated)
    match rope["rope_type"]:
        case "default":
            return Angles(inv_freq=plain, concentration=1.0)
        case "linear":
            return Angles(inv_freq=plain / rope["factor"], concentration=1.0)
        case "llama3":
            return Angles(inv_freq=_llama3(plain, rope), concentration=1.0)
        case "yarn":
            return Angles(inv_freq=_yarn(rope, rotated), concentration=_CONCENTRATIONS[engine](rope))
    raise ValueError(f"rope_type is {rope['rope_type']}, expected default, linear, llama3 or yarn")


def _rotated(config: LlamaConfig, rope: Mapping[str, Any], engine: Engine) -> int:
    assert config.head_dim is not None
    # SGLang reads it beside the block.
    share = rope.get("partial_rotary_factor") if engine == "vllm" else config.to_dict().get("partial_rotary_factor")
    return int(config.head_dim * (1.0 if share is None else share))


def _powers(theta: float, rotated: int) -> torch.Tensor:
    powers: torch.Tensor = theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return powers


def _llama3(plain: torch.Tensor, rope: Mapping[str, Any]) -> torch.Tensor:
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    share = (original / wavelength - low) / (high - low) if low != high else torch.zeros_like(plain)
    between = (1 - share) * plain / rope["factor"] + share * plain
    scaled = torch.where(wavelength > original / low, plain / rope["factor"], between)
    return torch.where(wavelength < original / high, plain, scaled)


def _yarn(rope: Mapping[str, Any], rotated: int) -> torch.Tensor:
    theta, original = rope["rope_theta"], rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return rotated * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast", 32)), dimension(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(rotated // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = _powers(theta, rotated)
    mixed: torch.Tensor = 1.0 / (rope["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
    return mixed


def _vllm_concentration(rope: Mapping[str, Any]) -> float:
    """``attention_factor`` is the whole of it; else the quotient of both ``mscale``, unless one is 0."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(rope, rope["mscale"]) / _mscale(rope, rope["mscale_all_dim"])
    return _mscale(rope)


def _sglang_concentration(rope: Mapping[str, Any]) -> float:
    """``attention_factor`` is not read; ``attn_factor`` comes on top of what it computes itself."""
    own = _mscale(rope)
    if rope.get("mscale") is not None and rope.get("mscale_all_dim") is not None:
        own = _mscale(rope, rope["mscale"]) / _mscale(rope, rope["mscale_all_dim"])
    return own * float(rope.get("attn_factor", 1.0))


def _mscale(rope: Mapping[str, Any], scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0


_CONCENTRATIONS: Mapping[Engine, Callable[[Mapping[str, Any]], float]] = {
    "vllm": _vllm_concentration,
    "sglang": _sglang_concentration,
}
