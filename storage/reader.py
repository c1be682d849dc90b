"""Reading features back, in any order, checked byte by byte.

Shapes: T tokens asked for, L boundaries of the store, H hidden size, K logits
kept per token.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import StoreCorruptError
from .files import file_hash, inside, require_inside
from .schema import Array, CommitRecord, DatasetInfo, SequenceFeatures, array_specs
from .shards import ShardedRows
from .store import FeatureStore, catalogue

_OPEN_PARTS = 1024


class PartReader:
    """One part; each array is opened when it is first asked for."""

    def __init__(self, path: Path, info: DatasetInfo, tokens: int, name: str | None = None) -> None:
        """``path`` is that of the part; ``name`` stands for it in errors if ``path`` is that of a copy."""
        self.path = path
        self._name = name or str(path)
        self._specs = array_specs(info)
        self._tokens = tokens
        self._arrays: dict[str, ShardedRows] = {}

    def read(self, name: str, start: int, out: Array, column: int | None = None) -> None:
        """Fill ``out`` (T, …) with rows ``start:start + T``; ``column`` picks one boundary of ``aux_hidden``."""
        if name not in self._arrays:
            shown = f"{self._name}/{name}"
            self._arrays[name] = ShardedRows(self.path / name, self._specs[name], self._tokens, shown)
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
        with self._part(sequence) as part:
            part.read(name, int(self.catalogue.offset[sequence]), out, column)

    def features(self, sequence: int) -> SequenceFeatures:
        """Return every array of a whole sequence."""
        start = int(self.catalogue.offset[sequence])
        with self._part(sequence) as part:
            return part.features(start, start + int(self.catalogue.length[sequence]))

    @contextmanager
    def _part(self, sequence: int) -> Iterator[PartReader]:
        unit = int(self.catalogue.unit[sequence])
        record = self.store.records[unit]
        if unit not in self._parts:
            check_sizes(self.store, record)
        with self.store.local_part(record) as path:
            if unit not in self._parts:
                check_metadata(self.store, record, path)
                tokens = sum(record.sequences.lengths)
                self._parts[unit] = PartReader(path, self.store.info, tokens, self.store.part_path(record))
                if len(self._parts) > _OPEN_PARTS:
                    self._parts.popitem(last=False)
            self._parts.move_to_end(unit)
            yield self._parts[unit]


def check_sizes(store: FeatureStore, record: CommitRecord) -> None:
    """Raise StoreCorruptError unless every file of a part is there with its size.

    Zarr libraries read a missing shard as zeros, so this comes before any reading.
    """
    part = store.part_path(record)
    sizes = store.place.sizes(store.part_key(record))
    for stored in record.objects:
        require_inside(part, stored.key)
        size = sizes.get(stored.key)
        if size != stored.size:
            found = "missing" if size is None else f"{size} bytes"
            raise StoreCorruptError(
                f"{part}/{stored.key}: {found}, the commit record says {stored.size} bytes. Delete "
                f"{store.commit_path(record.unit)} and rerun `specx extract`: only its sequences are extracted again."
            )


def check_metadata(store: FeatureStore, record: CommitRecord, path: Path) -> None:
    """Raise StoreCorruptError unless the metadata of the part at ``path`` is whole: chunk checksums do not cover it."""
    for stored in record.objects:
        file = inside(path, stored.key)
        if file.name == "zarr.json" and file_hash(file) != stored.xxh128:
            raise StoreCorruptError(
                f"{store.part_path(record)}/{stored.key}: the metadata was changed since it was committed. Delete "
                f"{store.commit_path(record.unit)} and rerun `specx extract`: only its sequences are extracted again."
            )
