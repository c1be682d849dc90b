"""Noise on the features that a draft is trained on, in place of its own errors.

Shapes: B rows, T tokens of a row.
"""

import torch

from .batch import PADDING, Batch

_NOISE_LENGTH = 512
"""Tokens of a sequence whose noise has the half-width itself (``AddUniformNoise`` of EAGLE's training code)."""


def uniform_noise(features: torch.Tensor, batch: Batch, half_width: float) -> torch.Tensor:
    """Return noise for ``features`` (B, T, …), in their dtype, from torch's own generator.

    It is U(-a, a) * 512 / T as in EAGLE's code, a the half-width and T the length of the token's own sequence.
    """
    B, rows = len(batch.documents), torch.arange(len(batch.documents), device=batch.documents.device)
    most = int(batch.documents.max()) + 2
    owner = (batch.documents - PADDING) + rows[:, None] * most  # a number of its own for each sequence
    length = torch.bincount(owner.flatten(), minlength=B * most)[owner]  # (B, T)
    scale = (half_width * _NOISE_LENGTH / length)[(..., *[None] * (features.ndim - 2))]
    drawn = torch.rand(features.shape, device=features.device)
    return ((2 * drawn - 1) * scale).to(features.dtype)
