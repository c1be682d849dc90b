"""What is measured of a store: on a sample of its sequences where all of them would take too long.

Shapes: S sequences, T tokens, L boundaries, H hidden size, K logits kept per token, V target vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..storage.reader import FeatureReader

POSITION_EDGES = (0, 1, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Where buckets of positions begin; the first token has one of its own, as its norm often is of another size."""

_SEQUENCES = 64
_TOKENS = 65_536
"""Of the hidden states; with H 2880 and three boundaries 1.5 GB to read."""
_COUNTED_TOKENS = 50_000_000
"""Of the token ids, which are small: 250 MB to read."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Of a sample of whole sequences, or their beginnings."""

    sequences: int
    tokens: int
    rms: Mapping[str, Floats]
    """By array: root mean square of an entry, by bucket of position; nan where the sample has none"""
    mass: Floats
    """(K,) mean probability that the k most likely tokens hold together"""
    low_mass: Floats
    """(K,) the same, of the token that a tenth of all are below"""


def measure(reader: FeatureReader, *, seed: int = 0, sequences: int = _SEQUENCES, tokens: int = _TOKENS) -> Measured:
    """Read at most so many sequences and tokens, the same ones for the same store and seed."""
    info, lengths = reader.store.info, reader.catalogue.length
    chosen = np.random.default_rng(seed).permutation(len(lengths))[:sequences]
    names = [f"boundary {boundary}" for boundary in info.boundaries] + (["last hidden"] if info.last_hidden else [])
    squares = np.zeros((len(names), len(POSITION_EDGES)))
    sizes = np.zeros(len(POSITION_EDGES))
    masses, room, read = [], tokens, 0
    for sequence in map(int, chosen):
        T = min(int(lengths[sequence]), room)
        if T == 0:
            break
        room, read = room - T, read + 1
        bucket = np.searchsorted(POSITION_EDGES, np.arange(T), side="right") - 1
        sizes += np.bincount(bucket, minlength=len(sizes))
        hidden = np.empty((T, info.hidden_size), np.uint16)
        for row in range(len(names)):
            if row < len(info.boundaries):
                reader.read(sequence, "aux_hidden", hidden, row)
            else:
                reader.read(sequence, "last_hidden", hidden)
            squares[row] += np.bincount(bucket, _mean_square(hidden), len(sizes))
        logprob = np.empty((T, info.top_k), np.float16)
        reader.read(sequence, "topk_logprob", logprob)
        masses.append(np.exp(logprob.astype(np.float32)).cumsum(axis=1))
    mass = np.concatenate(masses) if masses else np.zeros((1, info.top_k), np.float32)
    with np.errstate(invalid="ignore"):
        rms = np.sqrt(squares / sizes)
    return Measured(
        sequences=read,
        tokens=int(sizes.sum()),
        rms=dict(zip(names, rms, strict=True)),
        # Rounded to float16 they may add up to a little more than 1.
        mass=np.minimum(mass.mean(axis=0, dtype=np.float64), 1.0),
        low_mass=np.minimum(np.quantile(mass, 0.1, axis=0), 1.0),
    )


def _mean_square(bits: npt.NDArray[np.uint16]) -> Floats:
    """Return the mean square (T,) of hidden states (T, H), bits of bfloat16."""
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    mean: Floats = np.square(values, dtype=np.float64).mean(axis=1)
    return mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How many supervised tokens a draft vocabulary of each size holds."""

    tokens: int
    """Supervised ones, counted"""
    is_whole: bool
    """Whether all of the store was counted"""
    share: Floats
    """(V,) of the tokens, by the size - 1 of a vocabulary of the most frequent ones"""


def coverage(reader: FeatureReader, *, seed: int = 0, tokens: int = _COUNTED_TOKENS) -> Coverage:
    """Count the supervised tokens of a store, or of as many of its parts, at least one, as have so many tokens."""
    lengths, units = reader.catalogue.length, reader.catalogue.unit
    chosen: list[npt.NDArray[np.int64]] = []
    room = tokens
    for unit in np.random.default_rng(seed).permutation(np.unique(units)):
        here = np.flatnonzero(units == unit)
        if chosen and lengths[here].sum() > room:
            break
        chosen.append(here)
        room -= int(lengths[here].sum())
    counts = np.zeros(reader.store.info.vocab_size, np.int64)
    sequences = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    for ids in reader.supervised_tokens(sequences):
        counts += np.bincount(ids, minlength=len(counts))
    total = int(counts.sum())
    return Coverage(
        tokens=total,
        is_whole=len(sequences) == len(lengths),
        share=np.sort(counts)[::-1].cumsum() / max(total, 1),
    )
