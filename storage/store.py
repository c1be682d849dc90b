"""Opening and creating a store, and the catalogue of what is in it.

The commit records are the source of truth: a part that none of them names does
not exist.

Shapes: S sequences of the store.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import StoreCorruptError, StoreError
from .files import TEMPORARY_PREFIX, require_inside
from .hashing import SEQUENCE_ID_BYTES
from .place import Place, place_at
from .schema import CommitRecord, DatasetInfo, parse_record

DATASET_FILE = "dataset.json"
TARGET_DIRECTORY = "target"
PARTS_DIRECTORY = "parts"
COMMITS_DIRECTORY = "commits"
REJECTS_DIRECTORY = "rejects"

_TARGET_CONFIG = "config.json"
_READS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """Every committed sequence, a row each, in the order of commit."""

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


def catalogue(records: Mapping[int, CommitRecord]) -> Catalogue:
    """Build the catalogue of some commit records, in the order of their units."""
    ordered = [records[unit] for unit in sorted(records)]
    columns = [record.sequences for record in ordered]
    lengths = [np.asarray(column.lengths, np.int64) for column in columns]
    identifiers = bytes.fromhex("".join("".join(column.ids) for column in columns))

    def joined(name: str) -> list[object]:
        return [value for column in columns for value in getattr(column, name)]

    return Catalogue(
        ids=np.frombuffer(identifiers, np.uint8).reshape(-1, SEQUENCE_ID_BYTES),
        unit=np.repeat([record.unit for record in ordered], [len(part) for part in lengths]).astype(np.int64),
        offset=np.concatenate([np.cumsum(part) - part for part in lengths] or [np.zeros(0, np.int64)]),
        length=np.concatenate(lengths or [np.zeros(0, np.int64)]),
        category=np.asarray(joined("categories"), object),
        source=np.asarray(joined("sources"), object),
        row=np.asarray(joined("rows"), np.int64),
    )


class FeatureStore:
    """A store on a local disk or on S3; ``refresh`` shows what others committed since."""

    def __init__(self, place: Place, info: DatasetInfo) -> None:
        self.place = place
        self.info = info
        self.records: dict[int, CommitRecord] = {}
        self._kept = ExitStack()
        self._target_directory: Path | None = None
        self.refresh()

    @classmethod
    def open(cls, path: str | Path | Place) -> "FeatureStore":
        """Open an existing store; raise StoreError if there is none."""
        place = place_at(path) if isinstance(path, str | Path) else path
        try:
            content = place.read(DATASET_FILE)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{place.name_of('')}: no feature store here ({DATASET_FILE} is missing). "
                "Make one with `specx extract --store`."
            ) from error
        return cls(place, parse_record(DatasetInfo, content, place.name_of(DATASET_FILE)))

    @classmethod
    def create(cls, path: str | Path | Place, info: DatasetInfo) -> "FeatureStore":
        """Open the store at ``path``, made now if there is none.

        Raises StoreMismatchError if the one there has another target or other settings.
        """
        place = place_at(path) if isinstance(path, str | Path) else path
        try:
            names = place.names("")
        except NotADirectoryError:
            names = ["a file"]
        if DATASET_FILE not in names:
            if not all(name.startswith(TEMPORARY_PREFIX) for name in names):
                raise StoreError(f"{place.name_of('')}: not empty and not a feature store. Choose another --store.")
            with place.write_errors():
                place.publish(DATASET_FILE, info.model_dump_json(indent=2).encode())
        store = cls.open(place)
        store.info.require_same(info, store.root)
        return store

    @property
    def root(self) -> str:
        """Path or URL, as users are told it."""
        return self.place.name_of("")

    @property
    def has_target(self) -> bool:
        """Whether what training needs of the target is there, and whole."""
        return _TARGET_CONFIG in self.place.names(TARGET_DIRECTORY)

    @property
    def target_directory(self) -> Path:
        """Holds the target's config, tokenizer and ``head.safetensors``, on the local disk.

        From S3 it is fetched the first time, and stays as long as this object. Raises StoreError if
        the store has none.
        """
        if self._target_directory is None:
            if not self.has_target:
                raise StoreError(f"{self.place.name_of(TARGET_DIRECTORY)}: missing. Rerun `specx extract`.")
            self._target_directory = self._kept.enter_context(self.place.local_tree(TARGET_DIRECTORY))
        return self._target_directory

    def new_target(self) -> AbstractContextManager[Path]:
        """Give a directory to fill with the target's files; leaving the block normally makes it the store's."""
        return self.place.new_tree(TARGET_DIRECTORY, last=_TARGET_CONFIG)

    def refresh(self) -> None:
        """Read the commit records published since the last look."""
        while fresh := [name for name in self._commit_names() if int(name[1:-5]) not in self.records]:
            keys = [f"{COMMITS_DIRECTORY}/{name}" for name in fresh]
            with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
                contents = list(pool.map(self.place.read, keys))
            for key, content in zip(keys, contents, strict=True):
                path = self.place.name_of(key)
                record = CommitRecord.from_bytes(content, path)
                if self.commit_key(record.unit) != key:
                    raise StoreCorruptError(
                        f"{path}: the record says it is of unit {record.unit}. Delete it and rerun `specx extract`."
                    )
                self.records[record.unit] = record
            # Again: a listing made while others publish may show a record and lack the one before it.

    def _commit_names(self) -> list[str]:
        names = self.place.names(COMMITS_DIRECTORY)
        return [name for name in names if name[:1] == "u" and name[1:-5].isdecimal() and name[-5:] == ".json"]

    def record(self, unit: int) -> CommitRecord:
        """Return the record of a unit; raise StoreError if it is not committed (any more)."""
        if unit not in self.records:
            raise StoreError(f"{self.commit_path(unit)}: missing. Rerun `specx extract`, or use another --out.")
        return self.records[unit]

    def commit_key(self, unit: int) -> str:
        """Return the key of the record of a unit."""
        return f"{COMMITS_DIRECTORY}/u{unit:06d}.json"

    def commit_path(self, unit: int) -> str:
        """Return where the record of a unit is or will be, as users are told it."""
        return self.place.name_of(self.commit_key(unit))

    def part_key(self, record: CommitRecord) -> str:
        """Return the key of the part a record names; raise StoreCorruptError if that is outside the store."""
        require_inside(self.place.name_of(PARTS_DIRECTORY), record.part)
        return f"{PARTS_DIRECTORY}/{record.part}"

    def part_path(self, record: CommitRecord) -> str:
        """Return where the part a record names is, as users are told it."""
        return self.place.name_of(self.part_key(record))

    def local_part(self, record: CommitRecord) -> AbstractContextManager[Path]:
        """Give a local directory with the part a record names while the block runs; its path is the same each time."""
        return self.place.local_tree(self.part_key(record), {stored.key: stored.size for stored in record.objects})

    def catalogue(self) -> Catalogue:
        """Return every committed sequence."""
        return catalogue(self.records)
