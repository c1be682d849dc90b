"""The rows that did not become sequences, as Parquet for the user to read.

A row is written once, however often it is met; memory holds 16 bytes a row.
"""

import hashlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from ..backends.base import Place
from ..backends.durable import content_hash
from ..errors import StoreCorruptError
from ..schema import Reject

REJECTS_DIRECTORY = "rejects"

ROWS_PER_FILE = 4096

REJECT_SCHEMA = pa.schema(
    [("source", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
)


class RejectLog:
    """Writes rejected rows as they come; use it as a context manager, which writes the rest however it is left."""

    def __init__(self, place: Place, *, rows_per_file: int = ROWS_PER_FILE) -> None:
        self._place = place
        self._rows_per_file = rows_per_file
        self._known = {_name(reject) for reject in _stored(place)}
        self._pending: list[Reject] = []
        self.count = 0
        """Rows added, those too that the store has already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, reject: Reject) -> None:
        """Note one row; it is on disk after the next flush at the latest."""
        self.count += 1
        name = _name(reject)
        if name not in self._known:
            self._known.add(name)
            self._pending.append(reject)
        if len(self._pending) >= self._rows_per_file:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, in a file of its own; nothing happens if there is nothing."""
        if not self._pending:
            return
        table = pa.Table.from_pylist([reject.model_dump() for reject in self._pending], schema=REJECT_SCHEMA)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        with self._place.write_errors():
            content = buffer.getvalue().to_pybytes()
            self._place.publish(f"{REJECTS_DIRECTORY}/{_file_name(content)}", content)
        self._pending = []


def read_rejects(place: Place) -> list[Reject]:
    """Return every rejected row, each once, whichever runs met it."""
    return list(dict.fromkeys(_stored(place)))


def count_rejects(place: Place) -> int:
    """Count the rejected rows, each once, without holding them."""
    return len({_name(reject) for reject in _stored(place)})


def check_rejects(place: Place) -> Iterator[str]:
    """Yield what is wrong with the files of rejects, a line each."""
    for name in _file_names(place):
        try:
            _content(place, name)
        except StoreCorruptError as error:
            yield str(error)


def _stored(place: Place) -> Iterator[Reject]:
    for name in _file_names(place):
        with pq.ParquetFile(pa.BufferReader(_content(place, name))) as file:
            for batch in file.iter_batches(ROWS_PER_FILE):
                for row in batch.to_pylist():
                    yield Reject(**row)


def _file_names(place: Place) -> list[str]:
    names = place.names(REJECTS_DIRECTORY)
    return [name for name in names if name.startswith("r") and name.endswith(".parquet")]


def _content(place: Place, name: str) -> bytes:
    content = place.read(f"{REJECTS_DIRECTORY}/{name}")
    if name != _file_name(content):
        path = place.name_of(f"{REJECTS_DIRECTORY}/{name}")
        raise StoreCorruptError(f"{path}: changed since it was written. Delete it: its rows are noted by the next run.")
    return content


def _file_name(content: bytes) -> str:
    # Its hash, so that damage is seen.
    return f"r{content_hash(content)}.parquet"


def _name(reject: Reject) -> bytes:
    return hashlib.blake2b(reject.model_dump_json().encode(), digest_size=16).digest()
