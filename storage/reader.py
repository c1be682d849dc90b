"""Reading features back, in any order, checked byte by byte.

Shapes: T tokens asked for, L boundaries of the store, H hidden size, K logits
kept per token.
"""

import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .backends.durable import file_hash, inside, require_inside
from .catalog.sequence_id import find
from .catalog.views import View
from .errors import StoreCorruptError, StoreError
from .parts.array_metadata import METADATA_FILE
from .parts.shard_reader import ShardedRows
from .schema import Array, CommitRecord, DatasetInfo, SequenceFeatures, StoredObject, array_specs
from .store import FeatureStore

_OPEN_PARTS = 1024
_READ_THREADS = 4
_WORTH_A_THREAD = 1 << 16
"""Bytes; what is smaller takes less time than handing it over."""


class PartReader:
    """One part; each array is opened when it is first asked for."""

    def __init__(
        self,
        path: Path,
        info: DatasetInfo,
        tokens: int,
        name: str | None = None,
        objects: Iterable[StoredObject] | None = None,
    ) -> None:
        """``path`` is that of the part; ``name`` stands for it in errors if ``path`` is that of a copy.

        ``objects`` are its files as they were committed, unless it is not committed yet.
        """
        self.path = path
        self._hashes: dict[str, dict[str, str]] | None = None
        if objects is not None:
            self._hashes = {}
            for stored in objects:
                array, _, key = stored.key.partition("/")
                self._hashes.setdefault(array, {})[key] = stored.chunks_xxh128
        self._name = name or str(path)
        self._specs = array_specs(info)
        self.tokens = tokens
        self._arrays: dict[str, ShardedRows] = {}

    def read(self, name: str, start: int, out: Array, column: int | None = None) -> None:
        """Fill ``out`` (T, …) with rows ``start:start + T``; ``column`` picks one boundary of ``aux_hidden``."""
        if name not in self._arrays:
            shown = f"{self._name}/{name}"
            hashes = None if self._hashes is None else self._hashes.get(name, {})
            self._arrays[name] = ShardedRows(self.path / name, self._specs[name], self.tokens, shown, hashes)
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


@dataclass(frozen=True, slots=True)
class Read:
    """Some rows that are wanted, and where."""

    sequence: int
    name: str
    out: Array
    """(T, …); the first T tokens are read"""
    column: int | None = None
    """One boundary of ``aux_hidden``; ``out`` is then (T, H)."""


class FeatureReader:
    """The sequences of a store, by their number in its catalogue."""

    def __init__(self, store: FeatureStore, units: Iterable[int] | None = None, view: View | None = None) -> None:
        """Read all committed units, or only those named: a run goes on with the data it began with.

        With a view only its sequences are there, with its masks, categories and sources.
        """
        self.store = store
        wanted = None if units is None else tuple(units)
        for unit in wanted or ():
            store.require(unit)
        self.catalogue = store.catalogue(wanted)
        self._view = view
        self._in_view: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        if view is not None:
            number = find(self.catalogue.ids, view.ids)
            self._in_view = number[number >= 0]
            self.catalogue = dataclasses.replace(
                self.catalogue.take(number >= 0),
                category=view.category[self._in_view],
                source=view.source[self._in_view],
                row=view.row[self._in_view],
            )
        self._threads = ThreadPoolExecutor(min(_READ_THREADS, os.cpu_count() or 1), thread_name_prefix="specx-read")
        # Batches to train on and batches to validate on are read by threads of their own.
        self._changing = threading.Lock()
        self._parts: OrderedDict[int, tuple[CommitRecord, PartReader]] = OrderedDict()

    def read(self, sequence: int, name: str, out: Array, column: int | None = None) -> None:
        """Fill ``out`` (T, …) with the first T tokens of one array of a sequence.

        A prefix of a causal sequence is a prefix of its features, so T may be less than the
        sequence's length. ``column`` picks one boundary of ``aux_hidden``; ``out`` is then (T, H).
        Raises StoreCorruptError where a byte differs from what was committed.
        """
        assert len(out) <= self.catalogue.length[sequence], "T is longer than the sequence"
        if name == "loss_mask" and (mask := self.other_mask(sequence)) is not None:
            out[:] = mask[: len(out)]
            return
        with self._part(sequence) as part:
            part.read(name, int(self.catalogue.offset[sequence]), out, column)

    def read_all(self, wanted: Iterable[Read], padding: Iterable[Array] = ()) -> None:
        """Do several reads at once, and set ``padding`` to zero.

        Decoding lets go of the interpreter, so threads share what is large.
        """
        ordered = sorted(wanted, key=lambda each: -each.out.nbytes)
        large = [each for each in ordered if each.out.nbytes >= _WORTH_A_THREAD]
        shared = [self._threads.submit(self._read, each) for each in large]
        shared += [self._threads.submit(each.fill, 0) for each in padding]
        for each in ordered[len(large) :]:
            self._read(each)
        for future in shared:
            future.result()

    def _read(self, wanted: Read) -> None:
        self.read(wanted.sequence, wanted.name, wanted.out, wanted.column)

    def stage(self, sequences: Iterable[int]) -> None:
        """Bring the parts of some sequences to the local disk, where they stay while there is room."""
        for unit in {int(self.catalogue.unit[sequence]) for sequence in sequences}:
            with self.store.local_part(self.store.records[unit]):
                """It is there now."""

    def features(self, sequence: int) -> SequenceFeatures:
        """Return every array of a whole sequence."""
        start = int(self.catalogue.offset[sequence])
        with self._part(sequence) as part:
            features = part.features(start, start + int(self.catalogue.length[sequence]))
        mask = self.other_mask(sequence)
        return features if mask is None else dataclasses.replace(features, loss_mask=mask)

    def supervised_tokens(self, sequences: npt.NDArray[np.int64]) -> Iterator[Array]:
        """Yield the ids (T,) int32 of the supervised tokens of some sequences, those of a part at once."""
        ordered = sequences[np.argsort(self.catalogue.unit[sequences], kind="stable")]
        starts = np.flatnonzero(np.diff(self.catalogue.unit[ordered]) != 0) + 1
        for here in np.split(ordered, starts) if len(ordered) else ():
            with self._part(int(here[0])) as part:
                input_ids, loss_mask = np.empty(part.tokens, np.int32), np.empty(part.tokens, np.uint8)
                part.read("input_ids", 0, input_ids)
                part.read("loss_mask", 0, loss_mask)
            # +1 where a sequence begins, -1 behind its end: their running sum tells what is in one.
            bounds = np.zeros(part.tokens + 1, np.int64)
            np.add.at(bounds, self.catalogue.offset[here], 1)
            np.add.at(bounds, self.catalogue.offset[here] + self.catalogue.length[here], -1)
            for sequence in here if self._view is not None else ():
                if (mask := self.other_mask(int(sequence))) is not None:
                    start = int(self.catalogue.offset[sequence])
                    loss_mask[start : start + len(mask)] = mask
            yield input_ids[(bounds.cumsum()[:-1] > 0) & (loss_mask == 1)]

    def other_mask(self, sequence: int) -> Array | None:
        """Return the view's own mask of a sequence; raise StoreError if it is not as long as the sequence."""
        mask = None if self._view is None else self._view.loss_mask(int(self._in_view[sequence]))
        length = int(self.catalogue.length[sequence])
        if mask is not None and len(mask) != length:
            raise StoreError(
                f"{self.store.root}: the view has a mask of {len(mask)} entries for sequence "
                f"{bytes(self.catalogue.ids[sequence]).hex()} of {length} tokens. Make the view again."
            )
        return mask

    @contextmanager
    def _part(self, sequence: int) -> Iterator[PartReader]:
        unit = int(self.catalogue.unit[sequence])
        with self._changing:
            opened = self._parts.get(unit)
            if opened:
                self._parts.move_to_end(unit)
        if opened:
            record, part = opened
            # What was fetched must be held, or it may give way to another part.
            with self.store.local_part(record) if self.store.place.is_remote else nullcontext():
                yield part
            return
        record = self.store.records[unit]
        check_sizes(self.store, record)
        with self.store.local_part(record) as path:
            check_metadata(self.store, record, path)
            tokens = sum(record.sequences.lengths)
            part = PartReader(path, self.store.info, tokens, self.store.part_path(record), record.objects)
            with self._changing:
                self._parts[unit] = record, part
                if len(self._parts) > _OPEN_PARTS:
                    self._parts.popitem(last=False)
            yield part


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
        if stored.key.rpartition("/")[2] == METADATA_FILE and file_hash(inside(path, stored.key)) != stored.xxh128:
            raise StoreCorruptError(
                f"{store.part_path(record)}/{stored.key}: the metadata was changed since it was committed. Delete "
                f"{store.commit_path(record.unit)} and rerun `specx extract`: only its sequences are extracted again."
            )
