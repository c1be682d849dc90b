"""Named subsets of a store: which sequences, with which mask, category and place in their data.

Features do not depend on any of these, so one store serves many data sets: each has
its view, and a sequence that two share is stored once. A view is a directory of
Parquet files, added to and never changed, each named by the hash of its content.

Shapes: S sequences of a view, T tokens of one.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..backends.base import Place
from ..backends.durable import content_hash
from ..errors import StoreCorruptError, StoreError
from ..schema import Array, Origin
from .sequence_id import SEQUENCE_ID_BYTES, names_of

VIEWS_DIRECTORY = "views"

SCHEMA = pa.schema(
    [
        ("id", pa.binary(SEQUENCE_ID_BYTES)),
        ("loss_mask", pa.list_(pa.uint8())),
        ("category", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)
"""``id`` is the sequence's hash; ``loss_mask`` is null where the stored one holds."""

_ROWS_PER_FILE = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SUFFIX = ".parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Some sequences, each once."""

    ids: npt.NDArray[np.uint8]
    """(S, 16)"""
    category: npt.NDArray[np.object_]
    """(S,) str"""
    source: npt.NDArray[np.object_]
    """(S,) str"""
    row: npt.NDArray[np.int64]
    """(S,)"""
    mask_bits: npt.NDArray[np.uint8]
    """Masks of all sequences, a bit a token."""
    mask_start: npt.NDArray[np.int64]
    """(S,) first bit of each; -1 where the stored mask holds"""
    mask_length: npt.NDArray[np.int64]
    """(S,) tokens"""

    def __len__(self) -> int:
        return len(self.row)

    def loss_mask(self, number: int) -> Array | None:
        """Return the mask (T,) uint8 of a sequence, or None if it is the stored one."""
        start, length = int(self.mask_start[number]), int(self.mask_length[number])
        if start < 0:
            return None
        first = start // 8
        bits = np.unpackbits(self.mask_bits[first : (start + length + 7) // 8])
        return bits[start - 8 * first :][:length]


class ViewWriter:
    """Adds sequences to a view, each once; use it as a context manager, which writes the rest however it is left."""

    def __init__(self, place: Place, name: str) -> None:
        """The view may exist. Raises StoreError for a name that cannot be one."""
        self._place = place
        self._folder = _folder(name)
        begun = load_views(place, [name]) if name in view_names(place) else None
        self._known = set(names_of(begun.ids)) if begun else set()
        self._pending: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, identifier: bytes, loss_mask: Array | None, origin: Origin) -> None:
        """Add a sequence with its mask (T,), or None for the stored one; nothing happens if the view has it."""
        if identifier in self._known:
            return
        self._known.add(identifier)
        self._pending.append(
            {
                "id": identifier,
                "loss_mask": loss_mask,
                "category": origin.category,
                "source": origin.source,
                "row": origin.row,
            }
        )
        if len(self._pending) >= _ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, in a file of its own."""
        if not self._pending:
            return
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self._pending, schema=SCHEMA), buffer, compression="zstd")
        content = buffer.getvalue().to_pybytes()
        with self._place.write_errors():
            self._place.publish(f"{self._folder}/{content_hash(content)}{_SUFFIX}", content)
        self._pending = []


def view_names(place: Place) -> list[str]:
    """Return the names of the views of a store."""
    return [name for name in place.names(VIEWS_DIRECTORY) if _NAME.fullmatch(name)]


def files_of_views(place: Place, names: Iterable[str]) -> list[str]:
    """Return what some views consist of now: keys below the store, or paths of views in files of their own.

    A name that ends in ``.parquet`` is such a file's. Raises StoreError for a view that is not there.
    """
    found: list[str] = []
    for name in names:
        if name.endswith(_SUFFIX):
            found.append(str(Path(name).absolute()))
            continue
        folder = _folder(name)
        files = [f"{folder}/{file}" for file in place.names(folder) if file.endswith(_SUFFIX)]
        if not files:
            known = ", ".join(view_names(place)) or "none"
            raise StoreError(
                f"{place.name_of('')}: no view {name}, there are: {known}. Make one by `specx extract --view`."
            )
        found += files
    return found


def load_views(place: Place, names: Iterable[str]) -> View:
    """Return what is in any of some views; a sequence that several have is as the first has it."""
    return read_view(place, files_of_views(place, names))


def read_view(place: Place, files: Iterable[str]) -> View:
    """Return what some of the files of views hold, as ``files_of_views`` names them.

    Raises StoreError for a file that is no view, StoreCorruptError for one that was changed.
    """
    builder = _Builder()
    for file in files:
        try:
            content = Path(file).read_bytes() if not file.startswith(f"{VIEWS_DIRECTORY}/") else _whole(place, file)
        except FileNotFoundError as error:
            raise StoreError(f"{file}: no such view. Name one of the store's, or a Parquet file.") from error
        try:
            with pq.ParquetFile(pa.BufferReader(content)) as parquet:
                for batch in parquet.iter_batches(_ROWS_PER_FILE):
                    builder.add(batch)
        except (pa.ArrowException, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise StoreError(
                f"{file}: not a view ({reason}). Expected Parquet with id (16 bytes) and loss_mask (list of 0 and 1)."
            ) from error
    return builder.view()


def check_views(place: Place) -> Iterator[str]:
    """Yield what is wrong with the files of a store's views, a line each."""
    for name in view_names(place):
        for file in files_of_views(place, [name]):
            try:
                _whole(place, file)
            except StoreCorruptError as error:
                yield str(error)


def copy_views(source: Place, into: Place) -> None:
    """Add the views of one store to those of another; views of one name become one."""
    for file in files_of_views(source, view_names(source)):
        with into.write_errors():
            into.publish(file, _whole(source, file))


class _Builder:
    """Gathers batches of rows into one view."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._ids: list[bytes] = []
        self._columns: dict[str, list[Any]] = {name: [] for name in ("category", "source", "row")}
        self._bits: list[Array] = []
        self._total_bits = 0
        self._start: list[int] = []
        self._length: list[int] = []

    def add(self, batch: pa.RecordBatch) -> None:
        names = batch.schema.names
        ids = batch["id"].cast(SCHEMA.field("id").type).to_pylist()
        rows = []
        for row, identifier in enumerate(ids):
            if identifier is not None and identifier not in self._known:
                self._known.add(identifier)
                rows.append(row)
        self._ids += [ids[row] for row in rows]
        for name, default in (("category", ""), ("source", ""), ("row", 0)):
            values = batch[name].to_pylist() if name in names else [default] * len(ids)
            self._columns[name] += [default if values[row] is None else values[row] for row in rows]
        masks = batch["loss_mask"].cast(SCHEMA.field("loss_mask").type) if "loss_mask" in names else None
        for row in rows:
            mask = masks[row] if masks is not None else None
            if mask is None or not mask.is_valid:
                self._start.append(-1)
                self._length.append(0)
                continue
            values = mask.values.to_numpy(zero_copy_only=False)
            if values.dtype != np.uint8 or (len(values) and values.max() > 1):
                raise ValueError("a loss_mask has entries other than 0 and 1")
            packed = np.packbits(values)
            self._start.append(self._total_bits)
            self._length.append(len(values))
            self._bits.append(packed)
            self._total_bits += 8 * len(packed)

    def view(self) -> View:
        return View(
            ids=np.frombuffer(b"".join(self._ids), np.uint8).reshape(-1, SEQUENCE_ID_BYTES),
            category=np.asarray(self._columns["category"], object),
            source=np.asarray(self._columns["source"], object),
            row=np.asarray(self._columns["row"], np.int64),
            mask_bits=np.concatenate([np.zeros(0, np.uint8), *self._bits]),
            mask_start=np.asarray(self._start, np.int64),
            mask_length=np.asarray(self._length, np.int64),
        )


def _folder(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r}: not the name of a view. Use letters, digits, '.', '_' and '-'.")
    return f"{VIEWS_DIRECTORY}/{name}"


def _whole(place: Place, file: str) -> bytes:
    content = place.read(file)
    if file.rpartition("/")[2] != f"{content_hash(content)}{_SUFFIX}":
        raise StoreCorruptError(
            f"{place.name_of(file)}: changed since it was written. Delete it and rerun `specx extract --view`."
        )
    return content
