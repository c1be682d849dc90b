"""The sequences of one or several stores under one numbering.

Shapes: S sequences of all stores.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...storage.reader import FeatureReader, Read
from ...storage.schema import Array, DatasetInfo
from ...storage.store import FeatureStore
from ..errors import TrainError


class Corpus:
    """Reads the boundaries that a draft needs from stores of one target."""

    def __init__(self, readers: Sequence[FeatureReader], boundaries: tuple[int, ...]) -> None:
        """Raises TrainError, naming both, if two stores cannot be trained on together, or if one lacks a boundary."""
        self.readers = readers
        stores = [reader.store for reader in readers]
        self.info = stores[0].info
        """Of the first store; what a corpus depends on is the same in all."""
        require_alike(stores, boundaries)
        self.boundaries = boundaries
        self._columns = [tuple(store.info.boundaries.index(each) for each in boundaries) for store in stores]
        sizes = [len(reader.catalogue) for reader in readers]
        self._first: list[int] = np.cumsum([0, *sizes]).tolist()
        self.store: npt.NDArray[np.int64] = np.repeat(np.arange(len(readers)), sizes)
        """(S,) number of the store"""
        self.ids: npt.NDArray[np.uint8] = _joined([reader.catalogue.ids for reader in readers])
        """(S, 16)"""
        self.length: npt.NDArray[np.int64] = _joined([reader.catalogue.length for reader in readers])
        """(S,) tokens"""
        self.unit: npt.NDArray[np.int64] = _joined(_units(readers))
        """(S,) a number for each part of any store"""

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def is_remote(self) -> bool:
        """Whether reading from any of the stores fetches parts first."""
        return any(reader.store.place.is_remote for reader in self.readers)

    def locate(self, sequence: int) -> tuple[FeatureReader, int]:
        """Return the reader of a sequence and its number there."""
        number = int(self.store[sequence])
        return self.readers[number], sequence - self._first[number]

    def read_all(self, wanted: Iterable[Read], padding: Iterable[Array] = ()) -> None:
        """Do several reads at once, and set ``padding`` to zero; ``column`` counts the corpus's boundaries."""
        shares: list[list[Read]] = [[] for _ in self.readers]
        for each in wanted:
            number = int(self.store[each.sequence])
            column = None if each.column is None else self._columns[number][each.column]
            shares[number].append(Read(each.sequence - self._first[number], each.name, each.out, column))
        for number, (reader, share) in enumerate(zip(self.readers, shares, strict=True)):
            reader.read_all(share, padding if number == 0 else ())

    def stage(self, sequences: Iterable[int]) -> None:
        """Bring the parts of some sequences to the local disk, where they stay while there is room."""
        numbers = np.fromiter(sequences, np.int64)
        for store, reader in enumerate(self.readers):
            if reader.store.place.is_remote:
                reader.stage((numbers[self.store[numbers] == store] - self._first[store]).tolist())

    def supervised_tokens(self, store: int, sequences: npt.NDArray[np.int64]) -> Iterator[Array]:
        """Yield the ids (T,) int32 of the supervised tokens of some sequences of one store, those of a part at once."""
        return self.readers[store].supervised_tokens(sequences - self._first[store])


def require_alike(stores: Sequence[FeatureStore], boundaries: Sequence[int]) -> None:
    """Raise TrainError, naming both, if two stores cannot be trained on together, or if one lacks a boundary."""
    first = stores[0]
    for store in stores:
        if store.info.target != first.info.target:
            raise TrainError(
                f"{store.root}: made by another target than {first.root}; a run has one. Train on stores of one target."
            )
        if _targets_kept(store.info) != _targets_kept(first.info):
            raise TrainError(
                f"{store.root}: {_targets_kept(store.info)}, but {first.root}: {_targets_kept(first.info)}. Train on "
                "stores that keep the same, or make them so by `specx store prune`."
            )
        if missing := sorted(set(boundaries) - set(store.info.boundaries)):
            raise TrainError(
                f"{store.root}: boundary {missing[0]} is not in the store, which has "
                f"{','.join(map(str, store.info.boundaries))}. Train on those, or extract again with "
                "other --boundaries."
            )


def _targets_kept(info: DatasetInfo) -> str:
    return "last hidden states kept" if info.last_hidden else f"only the top {info.top_k} logits kept"


def _units(readers: Sequence[FeatureReader]) -> list[npt.NDArray[np.int64]]:
    units, first = [], 0
    for reader in readers:
        units.append(reader.catalogue.unit + first)
        first += max(reader.store.records, default=-1) + 1
    return units


def _joined(columns: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    # Of millions of rows a copy is worth avoiding.
    return columns[0] if len(columns) == 1 else np.concatenate(columns)
