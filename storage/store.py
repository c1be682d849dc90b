"""Opening and creating a store.

The commit records are the source of truth: a part that none of them names does
not exist.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from .backends.base import Place, place_at
from .backends.durable import TEMPORARY_PREFIX, file_hash, require_inside
from .catalog.commit_log import Commits, commit_key
from .catalog.sequence_table import Catalogue
from .catalog.views import view_names
from .errors import StoreCorruptError, StoreError
from .schema import CommitRecord, DatasetInfo, FileHashes

DATASET_FILE = "dataset.json"
TARGET_DIRECTORY = "target"
PARTS_DIRECTORY = "parts"

_TARGET_CONFIG = "config.json"
_TARGET_HASHES = "hashes.json"


class FeatureStore:
    """A store on a local disk or on S3; ``refresh`` shows what others committed since."""

    def __init__(self, place: Place, info: DatasetInfo, *, tolerant: bool = False) -> None:
        self.place = place
        self.info = info
        self.records = Commits(place, tolerant=tolerant)
        """By unit."""
        self._kept = ExitStack()
        self._target_directory: Path | None = None

    @classmethod
    def open(
        cls, path: str | Path | Place, *, tolerant: bool = False, cache_bytes: int | None = None
    ) -> "FeatureStore":
        """Open an existing store; raise StoreError if there is none.

        ``tolerant`` leaves damaged commit records aside, in ``records.damaged``, instead of raising StoreCorruptError.
        ``cache_bytes`` bounds the local copies of parts that are elsewhere.
        """
        place = place_at(path, cache_bytes) if isinstance(path, str | Path) else path
        try:
            content = place.read(DATASET_FILE)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{place.name_of('')}: no feature store here ({DATASET_FILE} is missing). "
                "Make one with `specx extract --store`."
            ) from error
        info = DatasetInfo.from_bytes(content, place.name_of(DATASET_FILE))
        # The checksum is of the file, and no setting.
        return cls(place, info.model_copy(update={"crc32c": 0}), tolerant=tolerant)

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
                place.publish(DATASET_FILE, info.sealed().to_bytes())
        store = cls.open(place)
        store.info.require_same(info, store.root)
        return store

    def __len__(self) -> int:
        """Return the number of committed sequences."""
        return len(self.catalogue())

    def __repr__(self) -> str:
        info = self.info
        return f"FeatureStore({self.root!r}, {len(self)} sequences, boundaries {info.boundaries}, codec {info.codec})"

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the store's views."""
        return tuple(view_names(self.place))

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
            path = self._kept.enter_context(self.place.local_tree(TARGET_DIRECTORY))
            self.check_target(path)
            self._target_directory = path
        return self._target_directory

    @contextmanager
    def new_target(self) -> Iterator[Path]:
        """Give a directory to fill with the target's files; leaving the block normally makes it the store's."""
        with self.place.new_tree(TARGET_DIRECTORY, last=_TARGET_CONFIG) as path:
            yield path
            (path / _TARGET_HASHES).write_bytes(FileHashes(files=_hashes(path)).sealed().to_bytes())

    def check_target(self, path: Path) -> None:
        """Raise StoreCorruptError unless the target's files at ``path`` are those that were put there."""
        name = self.place.name_of(TARGET_DIRECTORY)
        how_to_mend = f"Delete {name} and rerun `specx extract`: the target's files are copied again."
        try:
            hashes = FileHashes.from_bytes((path / _TARGET_HASHES).read_bytes(), f"{name}/{_TARGET_HASHES}")
        except FileNotFoundError as error:
            raise StoreCorruptError(f"{name}/{_TARGET_HASHES}: missing. {how_to_mend}") from error
        found = _hashes(path)
        for file, expected in hashes.files.items():
            if found.get(file) != expected:
                what = "was changed or damaged" if file in found else "is missing"
                raise StoreCorruptError(f"{name}/{file}: {what}. {how_to_mend}")

    def refresh(self) -> None:
        """Read the commit records published since the last look."""
        self.records.refresh()

    def require(self, unit: int) -> None:
        """Raise StoreError if a unit is not committed (any more)."""
        if unit not in self.records:
            raise StoreError(f"{self.commit_path(unit)}: missing. Rerun `specx extract`, or use another --out.")

    def commit_key(self, unit: int) -> str:
        """Return the key of the record of a unit."""
        return commit_key(unit)

    def commit_path(self, unit: int) -> str:
        """Return where the record of a unit is or will be, as users are told it."""
        return self.records.path(unit)

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

    def catalogue(self, units: Iterable[int] | None = None) -> Catalogue:
        """Return every committed sequence, or those of some units."""
        return self.records.catalogue(units)


def open_store(path: str | Path, *, cache_bytes: int | None = None) -> FeatureStore:
    """Open a feature store, a local directory or ``s3://BUCKET/PREFIX``; raise StoreError if there is none.

    ``cache_bytes`` bounds the local copies of parts that are fetched from S3; by default what is free at TMPDIR.
    """
    return FeatureStore.open(path, cache_bytes=cache_bytes)


def _hashes(directory: Path) -> dict[str, str]:
    """Return the hash of every file of the target's directory but that of the hashes."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file.name != _TARGET_HASHES]
    return {file.relative_to(directory).as_posix(): file_hash(file) for file in files}
