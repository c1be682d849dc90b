"""Noise on the features that a draft reads in training, in place of the errors it will make itself.

Shapes: B rows, T tokens of a row.
"""

import torch

from .batch import PADDING, Batch

_LENGTH = 512
"""Tokens of a sequence whose noise has the half-width itself (``AddUniformNoise`` of EAGLE's training code)."""


def with_uniform_noise(features: torch.Tensor, batch: Batch, half_width: float) -> torch.Tensor:
    """Return ``features`` (B, T, …) of a batch with noise on them, scaled as EAGLE's code does.

    It is U(-a, a) * 512 / T, a the half-width and T the length of the token's own sequence, drawn on the CPU from the
    seed of each sequence: it is the same on every device and in whatever batch the sequence is.
    """
    assert batch.seeds is not None
    noise = torch.zeros(features.shape)
    for documents, seeds, row in zip(batch.documents.cpu(), batch.seeds.tolist(), noise, strict=True):
        lengths = torch.bincount(documents[documents != PADDING]).tolist()
        # A row may have fewer sequences than seeds.
        for drawn, seed in zip(row[: sum(lengths)].split(lengths), seeds, strict=False):
            half = half_width * _LENGTH / len(drawn)
            drawn.uniform_(-half, half, generator=torch.Generator().manual_seed(seed))
    return features + noise.to(features.device, features.dtype)
