"""Writing one part: a Zarr v3 group, sharded, immutable once closed.

A part holds whole sequences, one behind the other on the token axis. Nothing
refers to it before its commit record is published.

Shapes: N tokens, S sequences of the part, T tokens of one sequence.
"""

from pathlib import Path

import numpy as np
import zarr

from .codecs import compressors
from .files import file_hash
from .hashing import SEQUENCE_ID_BYTES
from .schema import (
    FORMAT_VERSION,
    Array,
    ArraySpec,
    CodecName,
    DatasetInfo,
    SequenceFeatures,
    StoredObject,
    array_specs,
)

SEQUENCE_TABLE = ("seq_offsets", "seq_ids")
"""Arrays (S + 1,) int64 and (S, 16) uint8: where each sequence starts and what it is."""


class _GrowingArray:
    """One array of a part, written a whole shard at a time so that no shard is written twice."""

    def __init__(self, group: zarr.Group, spec: ArraySpec, codec: CodecName) -> None:
        self._spec = spec
        self._pending: list[Array] = []
        self._pending_tokens = 0
        self._written = 0
        self._array = group.create_array(
            spec.name,
            shape=(0, *spec.inner_shape),
            dtype=spec.dtype,
            chunks=spec.chunk,
            shards=(spec.shard_tokens, *spec.inner_shape),
            compressors=compressors(codec, spec.dtype.itemsize),
            attributes=dict(spec.attributes),
            # Comparing each chunk with zero costs more than storing the few that are.
            config={"write_empty_chunks": True},
        )

    def append(self, rows: Array) -> None:
        self._pending.append(rows)
        self._pending_tokens += len(rows)
        while self._pending_tokens >= self._spec.shard_tokens:
            self._write(self._spec.shard_tokens)

    def _write(self, tokens: int) -> None:
        rows = np.concatenate(self._pending)
        end = self._written + tokens
        self._array.resize((end, *self._spec.inner_shape))
        self._array[self._written : end] = rows[:tokens]
        self._written = end
        # A copy: a view would keep the whole block alive.
        self._pending = [rows[tokens:].copy()]
        self._pending_tokens -= tokens

    def close(self) -> None:
        if self._pending_tokens:
            self._write(self._pending_tokens)


class PartWriter:
    """Collects sequences into one part."""

    def __init__(self, path: Path, info: DatasetInfo) -> None:
        self.path = path
        self.tokens = 0
        self._specs = array_specs(info)
        self._lengths: list[int] = []
        self._group = zarr.create_group(path, attributes={"specx": {"format": FORMAT_VERSION}})
        self._arrays = {name: _GrowingArray(self._group, spec, info.codec) for name, spec in self._specs.items()}

    def append(self, features: SequenceFeatures) -> None:
        """Add one sequence; its arrays must have the shapes and dtypes of ``SequenceFeatures``."""
        length = len(features.input_ids)
        for name, rows in features.arrays().items():
            spec = self._specs[name]
            if rows.shape != (length, *spec.inner_shape) or rows.dtype != spec.dtype:
                raise ValueError(
                    f"{name}: {rows.dtype} {rows.shape}, expected {spec.dtype} {(length, *spec.inner_shape)}"
                )
            self._arrays[name].append(rows)
        self._lengths.append(length)
        self.tokens += length

    def close(self, identifiers: list[bytes]) -> tuple[StoredObject, ...]:
        """Write what is pending and the sequence table, and list every file.

        ``identifiers`` are the 16-byte ids of the sequences in the order they were appended.
        """
        for array in self._arrays.values():
            array.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        table = np.frombuffer(b"".join(identifiers), np.uint8).reshape(len(self._lengths), SEQUENCE_ID_BYTES)
        tables: tuple[Array, Array] = (offsets, table)
        for name, rows in zip(SEQUENCE_TABLE, tables, strict=True):
            self._group.create_array(
                name, data=rows, chunks=rows.shape, compressors=compressors("lossless", rows.dtype.itemsize)
            )
        return tuple(
            StoredObject(key=file.relative_to(self.path).as_posix(), size=file.stat().st_size, xxh128=file_hash(file))
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
        )
