"""The sequences of a store as columns, a row each.

Shapes: S sequences.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from ..schema import CommitRecord
from .sequence_id import SEQUENCE_ID_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """Committed sequences, a row each, in the order of commit."""

    ids: npt.NDArray[np.uint8]
    """(S, 16)"""
    unit: npt.NDArray[np.int64]
    """(S,) number of the commit"""
    offset: npt.NDArray[np.int64]
    """(S,) first token within the part"""
    length: npt.NDArray[np.int64]
    """(S,) tokens"""
    category: npt.NDArray[np.object_]
    """(S,) str, empty where the data named none"""
    source: npt.NDArray[np.object_]
    """(S,) str, the file or data set the sequence was first seen in"""
    row: npt.NDArray[np.int64]
    """(S,) row within ``source``"""

    def __len__(self) -> int:
        return len(self.length)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Self:
        """Return some of the rows, by number or by a mask."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def catalogue_of(record: CommitRecord) -> Catalogue:
    """Return the sequences of one commit record."""
    columns = record.sequences
    length = np.asarray(columns.lengths, np.int64)
    return Catalogue(
        ids=np.frombuffer(bytes.fromhex("".join(columns.ids)), np.uint8).reshape(-1, SEQUENCE_ID_BYTES),
        unit=np.full(len(length), record.unit, np.int64),
        offset=np.cumsum(length) - length,
        length=length,
        category=np.asarray(columns.categories, object),
        source=np.asarray(columns.sources, object),
        row=np.asarray(columns.rows, np.int64),
    )


def joined(parts: Iterable[Catalogue]) -> Catalogue:
    """Return the rows of several catalogues in the order of their units; a unit is in one of them only."""
    found = [part for part in parts if len(part)] or [_EMPTY]
    whole = found[0]
    if len(found) > 1:
        whole = Catalogue(
            **{field.name: np.concatenate([getattr(part, field.name) for part in found]) for field in fields(_EMPTY)}
        )
    # Of millions of rows another copy is most of the time that opening a store takes.
    if np.all(whole.unit[1:] >= whole.unit[:-1]):
        return whole
    return whole.take(np.argsort(whole.unit, kind="stable"))


_EMPTY = Catalogue(
    ids=np.zeros((0, SEQUENCE_ID_BYTES), np.uint8),
    unit=np.zeros(0, np.int64),
    offset=np.zeros(0, np.int64),
    length=np.zeros(0, np.int64),
    category=np.zeros(0, object),
    source=np.zeros(0, object),
    row=np.zeros(0, np.int64),
)
