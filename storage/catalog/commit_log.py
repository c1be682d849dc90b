"""The commit records of a store: what is in it, and nothing else is.

Records are read and checked once; then their sequences are kept as columns, and a
record itself is read again when it is asked for. A large store has an index of the
columns, so that opening it reads none.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from ..backends.base import Place
from ..errors import StoreCorruptError, StoreError
from ..schema import CommitRecord
from .index import CommitStamp, Indexed, drop_index, load_index, save_index
from .sequence_table import Catalogue, catalogue_of, joined

COMMITS_DIRECTORY = "commits"

_log = logging.getLogger(__name__)

_READS_AT_ONCE = 8
_KEPT_SEQUENCES = 1 << 17
"""Of records in memory, all together: some 30 MB."""


class Commits(Mapping[int, CommitRecord]):
    """Records by unit; ``refresh`` finds those published since."""

    def __init__(self, place: Place, *, tolerant: bool = False) -> None:
        """Raises StoreCorruptError for a damaged record unless ``tolerant``, StoreError for one of a newer format."""
        self._place = place
        self._tolerant = tolerant
        self.damaged: dict[int, str] = {}
        """What is wrong with the records that were left aside."""
        self._known: dict[int, CommitStamp] = {}
        self._columns: list[Catalogue] = []
        self._indexed = 0
        self._records: OrderedDict[int, CommitRecord] = OrderedDict()
        self._kept_sequences = 0
        self._changing = threading.Lock()
        self.refresh()

    def __getitem__(self, unit: int) -> CommitRecord:
        """Raises StoreCorruptError if the record is not the one that was there first."""
        known = self._known[unit]
        with self._changing:
            record = self._records.get(unit)
            if record is None:
                record = self._read(unit)
                if record.crc32c != known.crc32c:
                    raise StoreCorruptError(f"{self.path(unit)}: replaced while it was in use. Rerun the command.")
                self._keep(record)
            self._records.move_to_end(unit)
        return record

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, unit: object) -> bool:
        return unit in self._known

    def path(self, unit: int) -> str:
        """Return where the record of a unit is or will be, as users are told it."""
        return self._place.name_of(commit_key(unit))

    def refresh(self) -> None:
        """Take note of the records published since the last look."""
        is_first = not self._known
        # Again: a listing made while others publish may show a record and lack the one before it.
        while fresh := self._fresh():
            stamps = self._place.stamps(COMMITS_DIRECTORY)
            if is_first:
                self._take_index(stamps)
                is_first = False
                continue
            with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
                contents = list(pool.map(self._place.read, map(commit_key, fresh)))
            for unit, content in zip(fresh, contents, strict=True):
                try:
                    self._add(self._parse(unit, content), stamps.get(_file_name(unit), ""))
                except StoreCorruptError as error:
                    if not self._tolerant:
                        raise
                    self.damaged[unit] = str(error)

    def add(self, record: CommitRecord) -> None:
        """Take note of a record that this process has published."""
        self._add(record, "")

    def catalogue(self, units: Iterable[int] | None = None) -> Catalogue:
        """Return the sequences of all units or of some."""
        if units is None:
            self._columns = [joined(self._columns)]
            return self._columns[0]
        wanted = np.asarray(sorted(units), np.int64)
        # Ascending in each, and what is asked for is the latest as a rule.
        near = [each for each in self._columns if len(each) and _overlap(each.unit, wanted)]
        return joined(each.take(np.isin(each.unit, wanted)) for each in near)

    def save_index(self, *, unindexed: int = 64) -> None:
        """Write an index if so many records are in none; a store that cannot be written to goes without."""
        if len(self._known) - self._indexed < unindexed:
            return
        stamps = self._place.stamps(COMMITS_DIRECTORY)
        # One published by this process has no stamp yet: it cannot have been replaced while its writer lives.
        commits = {
            unit: CommitStamp(stamp=known.stamp or stamps.get(_file_name(unit), ""), crc32c=known.crc32c)
            for unit, known in self._known.items()
        }
        try:
            save_index(self._place, Indexed(commits=commits, catalogue=self.catalogue()))
        except StoreError as error:
            _log.debug("no index: %s", error)
            return
        self._indexed = len(commits)

    def drop(self, unit: int) -> None:
        """Remove a record: its part is no longer in the store, and its sequences may be committed again."""
        self._place.remove(commit_key(unit))
        drop_index(self._place)
        self._known.pop(unit, None)
        self.damaged.pop(unit, None)
        if record := self._records.pop(unit, None):
            self._kept_sequences -= len(record.sequences.ids)
        self._columns = [part.take(part.unit != unit) for part in self._columns]

    def _fresh(self) -> list[int]:
        names = self._place.names(COMMITS_DIRECTORY)
        units = [int(name[1:-5]) for name in names if is_record(name)]
        return [unit for unit in units if unit not in self._known and unit not in self.damaged]

    def _take_index(self, stamps: Mapping[str, str]) -> None:
        indexed = load_index(self._place)
        if indexed is None:
            return
        valid = {unit: each for unit, each in indexed.commits.items() if stamps.get(_file_name(unit)) == each.stamp}
        rows = indexed.catalogue
        if len(valid) < len(indexed.commits):
            rows = rows.take(np.isin(rows.unit, list(valid)))
        self._known |= valid
        self._columns.append(rows)
        self._indexed = len(valid)

    def _read(self, unit: int) -> CommitRecord:
        try:
            return self._parse(unit, self._place.read(commit_key(unit)))
        except FileNotFoundError as error:
            raise StoreError(f"{self.path(unit)}: removed while it was in use. Rerun the command.") from error

    def _parse(self, unit: int, content: bytes) -> CommitRecord:
        path = self.path(unit)
        record = CommitRecord.from_bytes(content, path)
        if record.unit != unit:
            raise StoreCorruptError(f"{path}: the record says it is of unit {record.unit}. Delete it, rerun extract.")
        return record

    def _add(self, record: CommitRecord, stamp: str) -> None:
        self._known[record.unit] = CommitStamp(stamp=stamp, crc32c=record.crc32c)
        self._columns.append(catalogue_of(record))
        self._keep(record)

    def _keep(self, record: CommitRecord) -> None:
        self._records[record.unit] = record
        self._kept_sequences += len(record.sequences.ids)
        while self._kept_sequences > _KEPT_SEQUENCES and len(self._records) > 1:
            _, oldest = self._records.popitem(last=False)
            self._kept_sequences -= len(oldest.sequences.ids)


def commit_key(unit: int) -> str:
    """Return the key of the record of a unit."""
    return f"{COMMITS_DIRECTORY}/{_file_name(unit)}"


def is_record(name: str) -> bool:
    """Whether a file below ``commits/`` is a record, by its name."""
    return name[:1] == "u" and name[1:-5].isdecimal() and name[-5:] == ".json"


def _overlap(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> bool:
    """Whether the ranges of two ascending arrays overlap, the first of which is not empty."""
    return len(other) > 0 and bool(one[0] <= other[-1] and one[-1] >= other[0])


def _file_name(unit: int) -> str:
    return f"u{unit:06d}.json"
