"""The sequences of many commits in one Parquet file: a cache, so that a large store opens at once.

A file covers some commits, each named with the stamp that its place gave it and its
checksum. Whatever does not fit what is there now is left aside and read from the
commits instead; a store without an index, or with a damaged one, is the same store.

Shapes: S sequences.
"""

import json
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..backends.base import Place
from ..backends.durable import content_hash
from .sequence_id import SEQUENCE_ID_BYTES
from .sequence_table import Catalogue

_log = logging.getLogger(__name__)

INDEX_DIRECTORY = "index"

_VERSION = 1
_METADATA_KEY = b"specx.index"
_SCHEMA = pa.schema(
    [
        ("id", pa.binary(SEQUENCE_ID_BYTES)),
        ("unit", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("category", pa.dictionary(pa.int32(), pa.string())),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitStamp:
    """One state of a commit record's file."""

    stamp: str
    """As its place tells it: changes if the file does."""
    crc32c: int
    """The record's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexed:
    """What an index file tells."""

    commits: dict[int, CommitStamp]
    """By unit."""
    catalogue: Catalogue
    """Of these units."""


def save_index(place: Place, indexed: Indexed) -> None:
    """Put the only index file there is from now on into a store. Raises StoreError where it cannot be written."""
    units = {unit: [each.stamp, each.crc32c] for unit, each in indexed.commits.items()}
    metadata = {_METADATA_KEY: json.dumps({"version": _VERSION, "units": units}).encode()}
    buffer = pa.BufferOutputStream()
    pq.write_table(_table(indexed.catalogue).replace_schema_metadata(metadata), buffer, compression="zstd")
    content = buffer.getvalue().to_pybytes()
    name = _name(content)
    older = [each for each in place.names(INDEX_DIRECTORY) if each != name]
    with place.write_errors():
        place.publish(f"{INDEX_DIRECTORY}/{name}", content)
        for each in older:
            place.remove(f"{INDEX_DIRECTORY}/{each}")


def load_index(place: Place) -> Indexed | None:
    """Return what the index of a store tells, or None if there is none that can be used."""
    for name in place.names(INDEX_DIRECTORY):
        content = _content(place, name)
        found = _parse(content) if content else None
        if found:
            return found
        _log.debug("%s/%s: not used", INDEX_DIRECTORY, name)
    return None


def is_whole(place: Place, name: str) -> bool:
    """Whether an index file is what it was when it was written."""
    return _content(place, name) is not None


def _content(place: Place, name: str) -> bytes | None:
    """Return the content of an index file, or None if it is not what its name says or was just replaced."""
    try:
        content = place.read(f"{INDEX_DIRECTORY}/{name}")
    except FileNotFoundError:
        return None
    return content if name == _name(content) else None


def _name(content: bytes) -> str:
    # Its hash is its name, so that damage is seen.
    return f"{content_hash(content)}.parquet"


def drop_index(place: Place) -> None:
    """Remove every index file: what they say of commits that were removed must not be met again."""
    for name in place.names(INDEX_DIRECTORY):
        place.remove(f"{INDEX_DIRECTORY}/{name}")


def _table(catalogue: Catalogue) -> pa.Table:
    ids = np.ascontiguousarray(catalogue.ids)
    columns = {
        "id": pa.FixedSizeBinaryArray.from_buffers(_SCHEMA.field("id").type, len(ids), [None, pa.py_buffer(ids)]),
        "category": pa.array(catalogue.category, pa.string()).dictionary_encode(),
        "source": pa.array(catalogue.source, pa.string()).dictionary_encode(),
    }
    plain = {name: pa.array(getattr(catalogue, name)) for name in ("unit", "offset", "length", "row")}
    return pa.table({name: (columns | plain)[name] for name in _SCHEMA.names}, schema=_SCHEMA)


def _parse(content: bytes) -> Indexed | None:
    table = pq.read_table(pa.BufferReader(content), memory_map=False)
    head = json.loads(table.schema.metadata.get(_METADATA_KEY, b"{}"))
    if head.get("version") != _VERSION:
        return None
    table = table.combine_chunks()
    ids = table["id"].combine_chunks() if len(table) else None
    return Indexed(
        commits={int(unit): CommitStamp(stamp=stamp, crc32c=crc) for unit, (stamp, crc) in head["units"].items()},
        catalogue=Catalogue(
            ids=np.frombuffer(
                ids.buffers()[1], np.uint8, len(ids) * SEQUENCE_ID_BYTES, ids.offset * SEQUENCE_ID_BYTES
            ).reshape(-1, SEQUENCE_ID_BYTES)
            if ids is not None
            else np.zeros((0, SEQUENCE_ID_BYTES), np.uint8),
            unit=table["unit"].to_numpy(),
            offset=table["offset"].to_numpy(),
            length=table["length"].to_numpy(),
            category=_strings(table["category"]),
            source=_strings(table["source"]),
            row=table["row"].to_numpy(),
        ),
    )


def _strings(column: pa.ChunkedArray) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    """Return a dictionary column (S,) as Python strings, each value once in memory."""
    encoded = column.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        return np.zeros(0, object)
    values = np.asarray(encoded.dictionary.to_pylist(), object)
    strings: np.ndarray[tuple[int], np.dtype[np.object_]] = values[encoded.indices.to_numpy()]
    return strings
