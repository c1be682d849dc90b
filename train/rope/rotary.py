"""Rotary position embedding of a draft, computed from the rope block that is exported.

Training and serving thus start from the same block of numbers; ``export.verify``
compares what an engine would build from the exported file with what was trained. The angles
are those of transformers' classes bit for bit, which the tests hold them against.

Shapes: T positions, D head dimension, R of it that is rotated: all but for a partial rope.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import TrainError
from .frequencies import ROPE_TYPES, concentration, frequencies, mscale


def draft_rope(rope: Mapping[str, Any], where: str, *, has_partial_rotary: bool) -> dict[str, Any]:
    """Return the target's rope as the draft's config has it: every default that readers differ in spelled out.

    ``has_partial_rotary`` is whether the target honours ``partial_rotary_factor``.
    Raises TrainError for a rope that the draft's layer, or an engine, would not compute as the target does.
    """
    given = {key: value for key, value in rope.items() if value is not None}
    if given["rope_type"] not in ROPE_TYPES:
        raise TrainError(
            f"{where}: the target's rope is {given['rope_type']}, expected one of {', '.join(ROPE_TYPES)}. "
            "Drafts of this target are not supported."
        )
    # What the target ignores its draft would honour.
    if given.get("partial_rotary_factor", 1.0) == 1.0 or not has_partial_rotary:
        given.pop("partial_rotary_factor", None)
    if given["rope_type"] != "yarn":
        return given
    # vLLM and SGLang read different keys for the concentration, and without any compute the same number.
    expected = mscale(given)
    found = given.pop("attention_factor", expected)
    if "mscale" in given or "mscale_all_dim" in given or not math.isclose(found, expected, rel_tol=1e-6):
        raise TrainError(
            f"{where}: the target's YaRN is {dict(rope)}, expected no mscale and no concentration but "
            f"{expected:.6f}. Drafts of this target are not supported."
        )
    return {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | given


class RotaryEmbedding(nn.Module):
    """Turns positions into cos and sin."""

    inv_freq: torch.Tensor
    """(R/2,) float32, radians a position"""

    def __init__(self, head_dim: int, rope: Mapping[str, Any]) -> None:
        """Take the block as the draft's config has it. Raises KeyError for a missing key."""
        super().__init__()
        rotated = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
        self.register_buffer("inv_freq", frequencies(rope, rotated), persistent=False)
        self.attention_scaling = concentration(rope)

    def angles(self) -> dict[str, Any]:
        """Return what the angles come to, as a checkpoint keeps it: inv_freq (R/2,) on the CPU, attention_scaling."""
        return {"inv_freq": self.inv_freq.cpu(), "attention_scaling": float(self.attention_scaling)}

    @torch.no_grad()
    def forward(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``positions`` (B, T) to cos and sin (B, T, R), R in two equal halves, in the dtype of ``like``.

        Both carry YaRN's concentration. They are computed in float32, whatever autocast says.
        """
        angles = positions[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(like.dtype), sin.to(like.dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R of ``heads`` (B, n, T, D) by ``cos`` and ``sin`` (B, T, R); the rest stays."""
    R = cos.shape[-1]
    if heads.shape[-1] > R:
        return torch.cat((rotate(heads[..., :R], cos, sin), heads[..., R:]), dim=-1)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def rotate_rows(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Do the same to ``heads`` (M, n, D) with one half of ``cos`` and ``sin``, (M, R/2), in fewer passes."""
    rotated: torch.Tensor = _Rotation.apply(heads, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """Its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    widths = [half, half, heads.shape[-1] - 2 * half]
    first, second, rest = torch.split_with_sizes(heads, widths, dim=-1)
    new_first, new_second, new_rest = torch.split_with_sizes(rotated, widths, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    new_rest.copy_(rest)
    return rotated
