"""Writing one part: a Zarr v3 group, sharded, immutable once closed.

A part holds whole sequences, one behind the other on the token axis. Nothing
refers to it before its commit record is published.

Shapes: N tokens, S sequences of the part, T tokens of one sequence.
"""

from pathlib import Path

import numpy as np
import zarr

from ..backends.durable import file_hash
from ..catalog.sequence_id import SEQUENCE_ID_BYTES
from ..codec_names import CodecName
from ..codecs.quantization import LossyName, QuantizationError, decode, encode
from ..codecs.registry import compressors, serializer, zstd
from ..schema import (
    FORMAT_VERSION,
    Array,
    ArraySpec,
    CommitRecord,
    DatasetInfo,
    SequenceFeatures,
    StoredObject,
    array_specs,
)
from .array_metadata import METADATA_FILE
from .shard_reader import chunks_hash

SEQUENCE_TABLE = ("seq_offsets", "seq_ids")
"""Arrays (S + 1,) int64 and (S, 16) uint8: where each sequence starts and what it is."""


_MEASURED = 16
"""Of so many tokens, one is restored after quantisation to see what was lost."""


class _GrowingArray:
    """One array of a part, written a whole shard at a time so that no shard is written twice."""

    def __init__(self, group: zarr.Group, spec: ArraySpec, codec: CodecName) -> None:
        self._spec = spec
        self._shard = np.empty((spec.shard_tokens, *spec.inner_shape), spec.dtype)
        self._filled = 0
        self._written = 0
        self._lossy: LossyName | None = None
        if spec.is_hidden and (codec == "int8" or codec == "fp8"):
            self._lossy = codec
        self.error = QuantizationError()
        """What a lossy codec lost, on a sample."""
        self._array = group.create_array(
            spec.name,
            shape=(0, *spec.inner_shape),
            dtype=spec.dtype,
            chunks=spec.chunk,
            shards=(spec.shard_tokens, *spec.inner_shape),
            serializer=serializer(codec, spec),
            compressors=compressors(codec, spec),
            attributes=dict(spec.attributes),
            # Comparing each chunk with zero costs more than storing the few that are.
            config={"write_empty_chunks": True},
        )

    def append(self, rows: Array) -> None:
        while len(rows):
            fitting = rows[: self._spec.shard_tokens - self._filled]
            self._shard[self._filled : self._filled + len(fitting)] = fitting
            self._filled += len(fitting)
            rows = rows[len(fitting) :]
            if self._filled == self._spec.shard_tokens:
                self._write()

    def _write(self) -> None:
        rows = self._shard[: self._filled]
        end = self._written + self._filled
        self._array.resize((end, *self._spec.inner_shape))
        self._array[self._written : end] = rows
        if self._lossy:
            sample = rows[::_MEASURED].reshape(-1, rows.shape[-1])
            self.error.add(sample, decode(self._lossy, encode(self._lossy, sample).tobytes(), sample.shape))
        self._written, self._filled = end, 0

    def close(self) -> None:
        if self._filled:
            self._write()

    @property
    def is_lossy(self) -> bool:
        return self._lossy is not None


class AdoptedPart:
    """A whole part of another store, to be committed as it is; stands where a ``PartWriter`` does."""

    def __init__(self, path: Path, record: CommitRecord) -> None:
        self.path = path
        self.tokens = sum(record.sequences.lengths)
        self.quantization_error = record.quantization_error
        self._objects = record.objects

    def close(self, identifiers: list[bytes]) -> tuple[StoredObject, ...]:
        """List every file."""
        return self._objects


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
        """Add one sequence; its arrays must be those of the store, in the shapes and dtypes of ``SequenceFeatures``."""
        length = len(features.input_ids)
        arrays = features.arrays()
        if arrays.keys() != self._specs.keys():
            raise ValueError(f"arrays {sorted(arrays)}, expected {sorted(self._specs)}")
        for name, rows in arrays.items():
            spec = self._specs[name]
            if rows.shape != (length, *spec.inner_shape) or rows.dtype != spec.dtype:
                raise ValueError(
                    f"{name}: {rows.dtype} {rows.shape}, expected {spec.dtype} {(length, *spec.inner_shape)}"
                )
            self._arrays[name].append(rows)
        self._lengths.append(length)
        self.tokens += length

    @property
    def quantization_error(self) -> dict[str, float]:
        """Relative L2 error of what was written so far, by array, of those with a lossy codec."""
        return {name: array.error.relative for name, array in self._arrays.items() if array.is_lossy}

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
            self._group.create_array(name, data=rows, chunks=rows.shape, compressors=zstd(rows.dtype.itemsize))
        return tuple(self._stored(file) for file in sorted(self.path.rglob("*")) if file.is_file())

    def _stored(self, file: Path) -> StoredObject:
        key = file.relative_to(self.path)
        spec = self._specs.get(key.parts[0])
        return StoredObject(
            key=key.as_posix(),
            size=file.stat().st_size,
            xxh128=file_hash(file),
            chunks_xxh128=chunks_hash(file, spec) if spec and file.name != METADATA_FILE else "",
        )
