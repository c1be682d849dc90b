"""Noise on the features that a draft reads in training, in place of the errors it will make itself.

Shapes: B rows, T tokens of a row.
"""

import torch

from .batch import PADDING, Batch

_LENGTH = 512
"""Tokens of a sequence whose noise has the half-width itself (``AddUniformNoise`` of EAGLE's training code)."""


def with_uniform_noise(
    features: torch.Tensor, batch: Batch, half_width: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return ``features`` (B, T, …) of a batch with noise on them, scaled as EAGLE's code does.

    It is U(-a, a) * 512 / T, a the half-width and T the length of the token's own sequence.
    """
    if generator is None:
        generator = torch.Generator(features.device).manual_seed(torch.initial_seed())
    B, device = len(batch.documents), batch.documents.device
    most = int(batch.documents.max()) + 2
    # A number of its own for each sequence, and for the padding of each row.
    owner = batch.documents - PADDING + most * torch.arange(B, device=device)[:, None]
    length = torch.bincount(owner.flatten(), minlength=B * most)[owner]  # (B, T)
    scale = (half_width * _LENGTH / length).reshape(*length.shape, *[1] * (features.ndim - 2))
    drawn = torch.rand(features.shape, generator=generator, device=generator.device)
    return features + ((2 * drawn - 1).to(device) * scale).to(features.dtype)
