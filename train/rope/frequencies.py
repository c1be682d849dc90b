"""The rotary angles that a rope block stands for: frequencies, and YaRN's factor on cos and sin.

Shapes: R dimensions of a head that are rotated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Angles:
    """What a rotary embedding comes to: position times frequency, and a factor on cos and sin."""

    inv_freq: torch.Tensor
    """(R/2,) float32, radians a position"""
    concentration: float


def frequencies(rope: Mapping[str, Any], rotated: int) -> torch.Tensor:
    """Return (R/2,) float32, radians a position, for ``rotated`` dimensions.

    default  theta ** (-2i / R) (RoFormer, arXiv 2104.09864, section 3.2.2)
    linear   position interpolation (arXiv 2306.15595, section 2.3)
    llama3   Llama 3.1's, interpolated by wavelength
    yarn     NTK by parts (YaRN, arXiv 2309.00071, section 3.2)

    Raises ValueError for another rope type, KeyError for a missing key.
    """
    match rope["rope_type"]:
        case "default":
            return _plain(rope, rotated)
        case "linear":
            return _plain(rope, rotated) / float(rope["factor"])
        case "llama3":
            return _llama3(_plain(rope, rotated), rope)
        case "yarn":
            return _yarn(rope, rotated)
    raise ValueError(f"rope_type is {rope['rope_type']}, expected one of {', '.join(ROPE_TYPES)}")


def concentration(rope: Mapping[str, Any]) -> float:
    """Return the factor on cos and sin (arXiv 2309.00071, section 3.4) as transformers and vLLM read it.

    ``attention_factor`` is the whole of it; else the quotient of both ``mscale``, unless one is 0.
    """
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope, rope["mscale"]) / mscale(rope, rope["mscale_all_dim"])
    return mscale(rope)


def mscale(rope: Mapping[str, Any], scale: float = 1.0) -> float:
    """Return YaRN's 0.1 ln(factor) + 1, the logarithm ``scale`` times."""
    return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0


def _powers(theta: float, rotated: int) -> torch.Tensor:
    powers: torch.Tensor = theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return powers


def _plain(rope: Mapping[str, Any], rotated: int) -> torch.Tensor:
    return 1.0 / _powers(rope["rope_theta"], rotated)


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
