"""How the rows of an array lie in its shards, as its ``zarr.json`` says.

Zarr's own library says it too, but takes a tenth of a second to be imported, and half a millisecond an array. So as
much of the metadata (Zarr v3; sharding, ZEP 2) is read here as ``part_writer`` writes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..codecs.quantization import OUTLIERS, LossyName
from ..errors import StoreCorruptError
from ..schema import ArraySpec

METADATA_FILE = "zarr.json"

Form = Literal["plain", "blosc", "pfor"] | LossyName
"""What the rows of a chunk are as bytes: themselves, compressed, or as ``pfor`` or ``quantization`` makes them."""

_FORMS: dict[tuple[str, ...], Form] = {
    ("bytes", "crc32c"): "plain",
    ("bytes", "blosc", "crc32c"): "blosc",
    ("specx.pfor", "crc32c"): "pfor",
    ("specx.int8", "blosc", "crc32c"): "int8",
    ("specx.fp8", "blosc", "crc32c"): "fp8",
}
_SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    # Numbers of one byte have no order of bytes.
    "bytes": ({"endian": "little"}, {}),
    "specx.pfor": ({},),
    "specx.int8": ({"outliers": OUTLIERS},),
    "specx.fp8": ({},),
    "crc32c": ({},),
}
_INDEX_CODECS = ["bytes", "crc32c"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the chunks of an array are, and what they went through."""

    chunk: tuple[int, ...]
    """Shape."""
    shard: tuple[int, ...]
    """Shape, a multiple of that of the chunks."""
    form: Form

    @property
    def chunks_of_a_shard(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(shard // chunk for shard, chunk in zip(self.shard, self.chunk, strict=True))


def read_layout(path: Path, spec: ArraySpec, tokens: int, name: str) -> Layout:
    """Return the layout of the array at ``path``, which ``name`` stands for in errors.

    Raises StoreCorruptError if it is another array than ``spec`` of so many tokens, or coded in a way unknown here.
    """
    try:
        metadata = json.loads((path / METADATA_FILE).read_bytes())
        shape, dtype = tuple(metadata["shape"]), metadata["data_type"]
        (codec,) = metadata["codecs"]
        sharding = codec["configuration"]
        chunk, shard = tuple(sharding["chunk_shape"]), tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        names = _names(sharding["codecs"])
        form = _FORMS.get(tuple(names))
        is_at_end = _names(sharding["index_codecs"]) == _INDEX_CODECS and sharding["index_location"] == "end"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreCorruptError(
            f"{name}/{METADATA_FILE}: not of a sharded array ({error!r}). Run `specx store verify` on the store."
        ) from error
    if shape != (tokens, *spec.inner_shape) or dtype != spec.dtype.name:
        raise StoreCorruptError(
            f"{name}: {dtype} {shape}, expected {spec.dtype} {(tokens, *spec.inner_shape)}. "
            "Run `specx store verify` on the store."
        )
    if form is None or not is_at_end:
        raise StoreCorruptError(f"{name}: unknown codecs {names}. Upgrade specx.")
    return Layout(chunk=chunk, shard=shard, form=form)


def _names(codecs: list[dict[str, Any]]) -> list[str]:
    """Return the names of some codecs, with the settings where they are not those that are known."""
    found = []
    for codec in codecs:
        name, settings = codec["name"], codec.get("configuration", {})
        # Blosc writes its own into every chunk.
        is_known = name == "blosc" or settings in _SETTINGS.get(name, ())
        found.append(name if is_known else f"{name} {settings}")
    return found
