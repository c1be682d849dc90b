"""Opening and creating a store, and the catalogue of what is in it.

The commit records are the source of truth: a part that none of them names does
not exist.

Shapes: S sequences of the store.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import StoreCorruptError, StoreError
from .files import TEMPORARY_PREFIX, disk_errors, inside, publish
from .hashing import SEQUENCE_ID_BYTES
from .schema import CommitRecord, DatasetInfo, parse_record

DATASET_FILE = "dataset.json"
TARGET_DIRECTORY = "target"
PARTS_DIRECTORY = "parts"
COMMITS_DIRECTORY = "commits"
REJECTS_DIRECTORY = "rejects"


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
    """A store on a local file system; ``refresh`` shows what others committed since."""

    def __init__(self, root: Path, info: DatasetInfo) -> None:
        self.root = root
        self.info = info
        self.records: dict[int, CommitRecord] = {}
        self.refresh()

    @classmethod
    def open(cls, path: str | Path) -> "FeatureStore":
        """Open an existing store; raise StoreError if there is none."""
        root = _local(path)
        try:
            content = (root / DATASET_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{root}: no feature store here ({DATASET_FILE} is missing). Make one with `specx extract --store`."
            ) from error
        return cls(root, parse_record(DatasetInfo, content, root / DATASET_FILE))

    @classmethod
    def create(cls, path: str | Path, info: DatasetInfo) -> "FeatureStore":
        """Open the store at ``path``, made now if there is none.

        Raises StoreMismatchError if the one there has another target or other settings.
        """
        root = _local(path)
        if not (root / DATASET_FILE).exists():
            if root.exists() and (not root.is_dir() or any(map(_is_strange, root.iterdir()))):
                raise StoreError(f"{root}: not empty and not a feature store. Choose another --store.")
            with disk_errors(root):
                publish(root / DATASET_FILE, info.model_dump_json(indent=2).encode())
        with disk_errors(root):
            for name in (PARTS_DIRECTORY, COMMITS_DIRECTORY):
                (root / name).mkdir(exist_ok=True)
        store = cls.open(root)
        store.info.require_same(info, root)
        return store

    @property
    def target_directory(self) -> Path:
        """Holds the target's config, tokenizer and ``head.safetensors``."""
        return self.root / TARGET_DIRECTORY

    def refresh(self) -> None:
        """Read the commit records published since the last look."""
        while fresh := [path for path in self._commit_paths() if int(path.stem[1:]) not in self.records]:
            for path in fresh:
                record = CommitRecord.from_bytes(path.read_bytes(), path)
                if self.commit_path(record.unit) != path:
                    raise StoreCorruptError(
                        f"{path}: the record says it is of unit {record.unit}. Delete it and rerun `specx extract`."
                    )
                self.records[record.unit] = record
            # Again: a listing made while others publish may show a record and lack the one before it.

    def _commit_paths(self) -> list[Path]:
        paths = sorted((self.root / COMMITS_DIRECTORY).glob("u*.json"))
        return [path for path in paths if path.stem[1:].isdecimal()]

    def record(self, unit: int) -> CommitRecord:
        """Return the record of a unit; raise StoreError if it is not committed (any more)."""
        if unit not in self.records:
            raise StoreError(f"{self.commit_path(unit)}: missing. Rerun `specx extract`, or use another --out.")
        return self.records[unit]

    def commit_path(self, unit: int) -> Path:
        """Return where the record of a unit is or will be."""
        return self.root / COMMITS_DIRECTORY / f"u{unit:06d}.json"

    def part_path(self, record: CommitRecord) -> Path:
        """Return the part a record names; raise StoreCorruptError if that is outside the store."""
        return inside(self.root / PARTS_DIRECTORY, record.part)

    def catalogue(self) -> Catalogue:
        """Return every committed sequence."""
        return catalogue(self.records)


def _is_strange(path: Path) -> bool:
    """Whether a file is there for another reason than that a store is being made, or its making was killed."""
    return path.name != DATASET_FILE and not path.name.startswith(TEMPORARY_PREFIX)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise StoreError(f"{path}: only stores on a local file system are supported. Give a path.")
    return Path(path).absolute()
