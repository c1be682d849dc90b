"""How large a store will be, before it is written.

Sizes without a codec and numbers of files are exact where the parts are. What the codec saves was measured
on stores of real features, so a new target's may differ by several per cent.

Shapes: P parts, S sequences.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..catalog.sequence_id import SEQUENCE_ID_BYTES
from ..codec_names import CodecName
from ..parts.part_writer import SEQUENCE_TABLE
from ..schema import ArraySpec, DatasetInfo, array_specs

Integers = npt.NDArray[np.int64]

# bfloat16 states at H = 2880, in the chunks of the schema. That of lossless was computed, for normal values whose
# exponents have the entropy that was measured there: 1.38 to 1.42. At H = 128 it was 1.40, and that of zstd 1.36.
_HIDDEN_RATIOS: dict[CodecName, float] = {"lossless": 1.40, "zstd": 1.44, "int8": 2.2, "fp8": 2.35}
# A store of 49,400 tokens by a trained gpt-oss with V = 2048 and K = 128: bytes in through bytes out, without
# what ``_overhead`` counts.
_RATIOS = {
    "topk_logprob": 2.40,
    "lse": 1.56,
    "loss_mask": 14.7,
}
# What a token id takes depends on the vocabulary: bits on disk through log2 V, in the same store. Made-up ids,
# drawn by Zipf's law, gave 0.77 to 0.87 up to V = 201,088, evenly drawn ones 1.03 to 1.15.
_ID_BITS = {"topk_ids": 0.83, "argmax": 0.80, "input_ids": 0.87}

_CHUNK_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16

# Of the same store: JSON as zarr writes it, the sequence table, the commit records.
_ARRAY_JSON_BYTES = 1290
_TABLE_JSON_BYTES = 715
_GROUP_JSON_BYTES = 108
_TABLE_BYTES = 20
_OFFSET_BYTES = 2.3
_COMMIT_BYTES = 250
_COMMIT_SEQUENCE_BYTES = 95
_COMMIT_OBJECT_BYTES = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """How sequences are cut into parts."""

    tokens: Integers
    """(P,) of each part"""
    sequences: Integers
    """(P,) of each part"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreEstimate:
    """What a store will hold. Bytes are by array, named as ``store info`` names them."""

    tokens: int
    sequences: int
    parts: int
    files: int
    """Of the parts, their commit records and ``dataset.json``; without those of ``target/`` and ``rejects/``."""
    raw_bytes_by_array: dict[str, int]
    """Of the values themselves."""
    bytes_by_array: dict[str, int]
    """On disk: behind the codec, with padding, indexes and checksums."""
    commit_bytes: int

    @property
    def raw_bytes(self) -> int:
        return sum(self.raw_bytes_by_array.values())

    @property
    def bytes(self) -> int:
        """Of the parts."""
        return sum(self.bytes_by_array.values())


def cut(lengths: npt.ArrayLike, tokens_per_part: int) -> Parts:
    """Cut sequences of ``lengths`` (S,) tokens as one writer does that gets them in this order."""
    ends = np.cumsum(np.asarray(lengths, np.int64))
    bounds = [0]
    while bounds[-1] < len(ends):
        before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        # The part is closed by the sequence that fills it, or by the last one.
        bounds.append(min(int(np.searchsorted(ends, before + tokens_per_part)) + 1, len(ends)))
    totals = np.concatenate([[0], ends])[bounds].astype(np.int64)
    return Parts(tokens=np.diff(totals), sequences=np.diff(np.asarray(bounds, np.int64)))


def spread(tokens: int, sequences: int, tokens_per_part: int, *, excess: float, writers: int = 1) -> Parts:
    """Cut sequences of which only the number is known.

    ``excess`` is by how many tokens a part exceeds ``tokens_per_part`` on average, since no sequence is
    split. Each of several writers ends with a part that is not full.
    """
    if not tokens or not sequences:
        return Parts(tokens=np.zeros(0, np.int64), sequences=np.zeros(0, np.int64))
    size = min(max(tokens_per_part + excess, tokens / sequences), tokens / writers)
    each = max(math.ceil(tokens / writers / size), 1)
    ends = np.minimum(np.arange(1, each + 1) * size, tokens / writers)
    bounds = np.concatenate([[0], (np.arange(writers)[:, None] * (tokens / writers) + ends).ravel()])
    return Parts(
        tokens=np.diff(np.rint(bounds).astype(np.int64)),
        sequences=np.diff(np.rint(bounds * (sequences / tokens)).astype(np.int64)),
    )


def estimate_size(info: DatasetInfo, parts: Parts) -> StoreEstimate:
    """Return what a store with these parts takes."""
    count, tokens, sequences = len(parts.tokens), int(parts.tokens.sum()), int(parts.sequences.sum())
    raw: dict[str, int] = {}
    stored: dict[str, int] = {}
    files = count * (1 + 2 * len(SEQUENCE_TABLE))
    for name, spec in array_specs(info).items():
        shards = int(_ceil(parts.tokens, spec.shard_tokens).sum())
        raw[name] = tokens * _token_bytes(spec)
        stored[name] = _payload(info, spec, parts) + _overhead(spec, parts) + count * _ARRAY_JSON_BYTES
        files += shards + count
    raw["seq_offsets"] = 8 * (sequences + count)
    raw["seq_ids"] = SEQUENCE_ID_BYTES * sequences
    table_bytes = count * (_TABLE_BYTES + _TABLE_JSON_BYTES)
    stored["seq_offsets"] = round(_OFFSET_BYTES * sequences) + table_bytes
    # A hash does not shrink.
    stored["seq_ids"] = raw["seq_ids"] + table_bytes
    stored["metadata"] = count * _GROUP_JSON_BYTES
    return StoreEstimate(
        tokens=tokens,
        sequences=sequences,
        parts=count,
        files=files + count + 1,
        raw_bytes_by_array=raw,
        bytes_by_array=stored,
        commit_bytes=count * _COMMIT_BYTES + sequences * _COMMIT_SEQUENCE_BYTES + files * _COMMIT_OBJECT_BYTES,
    )


def _payload(info: DatasetInfo, spec: ArraySpec, parts: Parts) -> int:
    """Return the bytes of an array's chunks without their checksums."""
    if info.codec == "none":
        # The last chunk of a part is whole.
        return int(_ceil(parts.tokens, spec.chunk[0]).sum()) * spec.chunk[0] * _token_bytes(spec)
    # Padding is zeros, which take next to nothing.
    known = _HIDDEN_RATIOS[info.codec] if spec.is_hidden else _RATIOS.get(spec.name)
    ratio = known or 8 * spec.dtype.itemsize / (_ID_BITS[spec.name] * math.log2(info.vocab_size))
    return round(int(parts.tokens.sum()) * _token_bytes(spec) / ratio)


def _overhead(spec: ArraySpec, parts: Parts) -> int:
    """Return the bytes of an array's checksums and shard indexes."""
    across = int(_ceil(np.asarray(spec.inner_shape, np.int64), np.asarray(spec.chunk[1:], np.int64)).prod())
    chunks = int(_ceil(parts.tokens, spec.chunk[0]).sum()) * across
    shards = int(_ceil(parts.tokens, spec.shard_tokens).sum())
    entries = spec.shard_tokens // spec.chunk[0] * across
    return chunks * _CHUNK_CHECKSUM_BYTES + shards * (entries * _INDEX_ENTRY_BYTES + _CHUNK_CHECKSUM_BYTES)


def _token_bytes(spec: ArraySpec) -> int:
    return int(math.prod(spec.inner_shape) * spec.dtype.itemsize)


def _ceil(values: Integers, size: int | Integers) -> Integers:
    quotients: Integers = -(-values // size)
    return quotients
