"""The lossy codecs as Zarr v3 codecs, so that any program that uses zarr-python can read a store.

zarr-python finds them by the entry points of the installed package. Written against zarr 3.1.

Shapes: R tokens of a chunk, H channels.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON
from zarr.registry import register_codec

from .quantization import OUTLIERS, LossyName, decode, encode


@dataclass(frozen=True)
class _LossyCodec(ArrayBytesCodec):
    """Bits of bfloat16, uint16 (R, 1…, H), to quantised rows of H."""

    is_fixed_size = True
    kind: ClassVar[LossyName]
    configuration: ClassVar[dict[str, JSON]] = {}

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Raises ValueError for settings other than those this was written for."""
        found = data.get("configuration", {})
        if found != cls.configuration:
            raise ValueError(f"codec specx.{cls.kind}: configuration {found}, expected {cls.configuration}")
        return cls()

    def to_dict(self) -> dict[str, JSON]:
        return {"name": f"specx.{self.kind}", "configuration": dict(self.configuration)}

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        rows = chunk_array.as_numpy_array().reshape(-1, chunk_spec.shape[-1])
        return chunk_spec.prototype.buffer.from_array_like(await asyncio.to_thread(encode, self.kind, rows))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        shape = chunk_spec.shape[0], chunk_spec.shape[-1]
        rows: Any = await asyncio.to_thread(decode, self.kind, chunk_bytes.to_bytes(), shape)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(rows.reshape(chunk_spec.shape))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("chunks are compressed, so nobody asks for their size before that")


class Int8Codec(_LossyCodec):
    """``int8`` of ``quantization``."""

    kind = "int8"
    configuration: ClassVar[dict[str, Any]] = {"outliers": OUTLIERS}


class Fp8Codec(_LossyCodec):
    """``fp8`` of ``quantization``."""

    kind = "fp8"


# For stores read or written where specx is on the path and not installed.
register_codec("specx.int8", Int8Codec)
register_codec("specx.fp8", Fp8Codec)
