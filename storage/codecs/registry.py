"""Codec names and the Zarr codecs behind them.

Every chunk ends in its crc32c: blosc alone lets almost every flipped byte through.
"""

from zarr.abc.codec import ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from ..codec_names import CodecName
from ..schema import ArraySpec
from .zarr_codecs import Fp8Codec, Int8Codec, PforCodec

# Hidden states shrink by 1.44 in blocks of this size, by 1.28 in those of the default size.
_BLOCK_BYTES = 512 * 1024


def serializer(codec: CodecName, spec: ArraySpec) -> ArrayBytesCodec:
    """Return the codec that makes bytes of an array; those of specx are for hidden states."""
    if spec.is_hidden and codec == "lossless":
        return PforCodec()
    if spec.is_hidden and codec == "int8":
        return Int8Codec()
    if spec.is_hidden and codec == "fp8":
        return Fp8Codec()
    return BytesCodec(endian="little")


def compressors(codec: CodecName, spec: ArraySpec) -> list[BytesBytesCodec]:
    """Return the bytes-to-bytes codecs of an array."""
    if codec == "none":
        return [Crc32cCodec()]
    if codec == "zstd" or not spec.is_hidden:
        return zstd(spec.dtype.itemsize)
    if codec == "lossless":
        # There is nothing left to compress.
        return [Crc32cCodec()]
    # Entropy coding is all that is left to do: the bytes of a value say nothing of each other.
    entropy = BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle", typesize=1, blocksize=_BLOCK_BYTES)
    return [entropy, Crc32cCodec()]


def zstd(itemsize: int) -> list[BytesBytesCodec]:
    """Return the bytes-to-bytes codecs that suit elements of ``itemsize`` bytes."""
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=itemsize, blocksize=_BLOCK_BYTES)
    return [blosc, Crc32cCodec()]
