"""The codecs of hidden states as Zarr v3 codecs, so that any program that uses zarr-python can read a store.

zarr-python finds them by the entry points of the installed package. Written against zarr 3.1.

Shapes: R tokens of a chunk, H channels.
"""

import asyncio
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON
from zarr.registry import register_codec

from .pfor import pack, unpack
from .quantization import OUTLIERS, Bits, Bytes, LossyName, decode, encode


@dataclass(frozen=True)
class _RowCodec(ArrayBytesCodec):
    """Bits of bfloat16, uint16 (R, 1…, H), to rows of H that are coded each for itself."""

    name: ClassVar[str]
    configuration: ClassVar[dict[str, JSON]] = {}

    @classmethod
    @abstractmethod
    def encode_rows(cls, rows: Bits) -> Bytes:
        """Return the bytes of rows (R, H)."""

    @classmethod
    @abstractmethod
    def decode_rows(cls, content: Bytes, shape: tuple[int, int]) -> Bits:
        """Return the rows (R, H); raise ValueError if they are not what ``content`` holds."""

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Raises ValueError for settings other than those this was written for."""
        found = data.get("configuration", {})
        if found != cls.configuration:
            raise ValueError(f"codec {cls.name}: configuration {found}, expected {cls.configuration}")
        return cls()

    def to_dict(self) -> dict[str, JSON]:
        return {"name": self.name, "configuration": dict(self.configuration)}

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        rows = chunk_array.as_numpy_array().reshape(-1, chunk_spec.shape[-1])
        return chunk_spec.prototype.buffer.from_array_like(await asyncio.to_thread(self.encode_rows, rows))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        shape = chunk_spec.shape[0], chunk_spec.shape[-1]
        rows: Any = await asyncio.to_thread(self.decode_rows, chunk_bytes.as_numpy_array().view(np.uint8), shape)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(rows.reshape(chunk_spec.shape))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a chunk depends on its values or on what compresses it, so nobody asks")


class PforCodec(_RowCodec):
    """Every bit, by ``pfor``."""

    name = "specx.pfor"
    is_fixed_size = False

    @classmethod
    def encode_rows(cls, rows: Bits) -> Bytes:
        return pack(rows)

    @classmethod
    def decode_rows(cls, content: Bytes, shape: tuple[int, int]) -> Bits:
        rows = np.empty(shape, np.uint16)
        end = unpack(content, 0, rows).stop
        if end != len(content):
            raise ValueError(f"{len(content)} bytes, expected {end}")
        return rows


class _LossyCodec(_RowCodec):
    """Fewer bits, by ``quantization``."""

    is_fixed_size = True
    kind: ClassVar[LossyName]

    @classmethod
    def encode_rows(cls, rows: Bits) -> Bytes:
        return encode(cls.kind, rows)

    @classmethod
    def decode_rows(cls, content: Bytes, shape: tuple[int, int]) -> Bits:
        return decode(cls.kind, content, shape)


class Int8Codec(_LossyCodec):
    """``int8`` of ``quantization``."""

    name = "specx.int8"
    kind = "int8"
    configuration: ClassVar[dict[str, Any]] = {"outliers": OUTLIERS}


class Fp8Codec(_LossyCodec):
    """``fp8`` of ``quantization``."""

    name = "specx.fp8"
    kind = "fp8"


# For stores read or written where specx is on the path and not installed.
for _codec in (PforCodec, Int8Codec, Fp8Codec):
    register_codec(_codec.name, _codec)
