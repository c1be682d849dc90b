"""Reading features back, in any order, checked byte by byte.

Shapes: T tokens asked for, L boundaries of the store, H hidden size, K logits
kept per token.
"""

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .errors import StoreCorruptError
from .files import file_hash, inside
from .schema import Array, CommitRecord, DatasetInfo, SequenceFeatures, array_specs
from .shards import ShardedRows
from .store import FeatureStore, catalogue

_OPEN_PARTS = 1024


class PartReader:
    """One part; each array is opened when it is first asked for."""

    def __init__(self, path: Path, info: DatasetInfo, tokens: int) -> None:
        self.path = path
        self._specs = array_specs(info)
        self._tokens = tokens
        self._arrays: dict[str, ShardedRows] = {}

    def read(self, name: str, start: int, out: Array, column: int | None = None) -> None:
        """Fill ``out`` (T, …) with rows ``start:start + T``; ``column`` picks one boundary of ``aux_hidden``."""
        if name not in self._arrays:
            self._arrays[name] = ShardedRows(self.path / name, self._specs[name], self._tokens)
        self._arrays[name].read(start, out, column)

    def features(self, start: int, stop: int) -> SequenceFeatures:
        """Return every array of tokens ``start:stop``."""
        arrays = {}
        for name, spec in self._specs.items():
            out = np.empty((stop - start, *spec.inner_shape), spec.dtype)
            if name == "aux_hidden":
                for column in range(out.shape[1]):
                    self.read(name, start, out[:, column], column)
            else:
                self.read(name, start, out)
            arrays[name] = out
        return SequenceFeatures(**arrays)


class FeatureReader:
    """The sequences of a store, by their number in its catalogue."""

    def __init__(self, store: FeatureStore, units: Iterable[int] | None = None) -> None:
        """Read all committed units, or only those named: a run goes on with the data it began with."""
        self.store = store
        wanted = store.records if units is None else {unit: store.record(unit) for unit in units}
        self.catalogue = catalogue(wanted)
        self._parts: OrderedDict[int, PartReader] = OrderedDict()

    def read(self, sequence: int, name: str, out: Array, column: int | None = None) -> None:
        """Fill ``out`` (T, …) with the first T tokens of one array of a sequence.

        A prefix of a causal sequence is a prefix of its features, so T may be less than the
        sequence's length. ``column`` picks one boundary of ``aux_hidden``; ``out`` is then (T, H).
        Raises StoreCorruptError where a byte differs from what was committed.
        """
        assert len(out) <= self.catalogue.length[sequence], "T is longer than the sequence"
        self._part(sequence).read(name, int(self.catalogue.offset[sequence]), out, column)

    def features(self, sequence: int) -> SequenceFeatures:
        """Return every array of a whole sequence."""
        start = int(self.catalogue.offset[sequence])
        return self._part(sequence).features(start, start + int(self.catalogue.length[sequence]))

    def _part(self, sequence: int) -> PartReader:
        unit = int(self.catalogue.unit[sequence])
        if unit not in self._parts:
            record = self.store.records[unit]
            check_objects(self.store, record)
            tokens = sum(record.sequences.lengths)
            self._parts[unit] = PartReader(self.store.part_path(record), self.store.info, tokens)
            if len(self._parts) > _OPEN_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(unit)
        return self._parts[unit]


def check_objects(store: FeatureStore, record: CommitRecord) -> None:
    """Raise StoreCorruptError unless every file of a part is there with its size, and its metadata is whole.

    Zarr libraries read a missing shard as zeros, and chunk checksums do not cover metadata, so this
    comes before any reading.
    """
    part = store.part_path(record)
    for stored in record.objects:
        path = inside(part, stored.key)
        size = path.stat().st_size if path.is_file() else None
        if size != stored.size:
            found = "missing" if size is None else f"{size} bytes"
            raise StoreCorruptError(
                f"{path}: {found}, the commit record says {stored.size} bytes. Delete "
                f"{store.commit_path(record.unit)} and rerun `specx extract`: only its sequences are extracted again."
            )
        if path.name == "zarr.json" and file_hash(path) != stored.xxh128:
            raise StoreCorruptError(
                f"{path}: the metadata was changed since it was committed. Delete "
                f"{store.commit_path(record.unit)} and rerun `specx extract`: only its sequences are extracted again."
            )
