"""Reading every byte of a store against what was committed, and un-committing what is damaged."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr

from ..backends.durable import file_hash, inside
from ..catalog.commit_log import COMMITS_DIRECTORY, is_record
from ..catalog.index import INDEX_DIRECTORY, is_whole
from ..catalog.rejects import check_rejects
from ..catalog.sequence_id import sequence_id
from ..catalog.views import check_views
from ..errors import StoreCorruptError, StoreError
from ..parts.part_writer import SEQUENCE_TABLE
from ..reader import PartReader, check_metadata, check_sizes
from ..schema import CommitRecord
from ..store import PARTS_DIRECTORY, TARGET_DIRECTORY, FeatureStore
from .config import VerifyConfig


@dataclass(kw_only=True, slots=True)
class Verification:
    """What ``store verify`` found."""

    sequences: int = 0
    """In sound units, as are tokens and bytes."""
    tokens: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """A line each; empty for a sound store."""
    damaged_units: dict[int, str] = field(default_factory=dict)
    """Those of the problems that end when a unit is un-committed, and its sequences extracted again."""
    unreferenced: list[str] = field(default_factory=list)
    """Parts and temporary files that no record names: leftovers of killed runs, harmless."""


def run(config: VerifyConfig) -> Verification:
    """Check a store and, if asked to, un-commit what is damaged."""
    store = FeatureStore.open(config.store, tolerant=True)
    result = verify(store)
    if config.drop_bad:
        drop_damaged(store, result)
    return result


def check(config: VerifyConfig, result: Verification) -> None:
    """Raise StoreError, one line, if anything is still wrong."""
    require_sound(config.store, result)


def verify(store: FeatureStore) -> Verification:
    """Check every record, file, checksum and sequence of a store, best of one that was opened ``tolerant``."""
    result = Verification(damaged_units=dict(store.records.damaged))
    seen: dict[str, int] = {}
    named: set[str] = set()
    for unit in sorted(store.records):
        try:
            record = store.records[unit]
            named.add(record.part)
            _verify_unit(store, record)
            _require_new(store, record, seen)
        except StoreCorruptError as error:
            result.damaged_units[unit] = str(error)
            continue
        seen |= dict.fromkeys(record.sequences.ids, unit)
        result.sequences += len(record.sequences.ids)
        result.tokens += sum(record.sequences.lengths)
        result.bytes += sum(stored.size for stored in record.objects)
    result.problems = [*result.damaged_units.values(), *_problems_beside(store)]
    for folder, is_published in ((PARTS_DIRECTORY, named.__contains__), (COMMITS_DIRECTORY, is_record)):
        result.unreferenced += [f"{folder}/{name}" for name in store.place.names(folder) if not is_published(name)]
    return result


def require_sound(where: str, result: Verification) -> None:
    """Raise StoreError, one line, if anything is wrong."""
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise StoreError(f"{where}: {len(result.problems)} damaged: {result.problems[0]}{more}")


def drop_damaged(store: FeatureStore, result: Verification) -> None:
    """Un-commit the damaged units, and take them out of the problems.

    Their sequences are no longer in the store, and `specx extract` adds them again.
    """
    for unit, problem in result.damaged_units.items():
        store.records.drop(unit)
        result.problems.remove(problem)


def _require_new(store: FeatureStore, record: CommitRecord, seen: dict[str, int]) -> None:
    for identifier in record.sequences.ids:
        if identifier in seen:
            raise StoreCorruptError(
                f"{store.commit_path(record.unit)}: sequence {identifier} is committed twice, first in unit "
                f"{seen[identifier]}."
            )


def _problems_beside(store: FeatureStore) -> Iterator[str]:
    """Yield what is wrong with the files that no commit names."""
    if store.place.names(TARGET_DIRECTORY):
        try:
            with store.place.local_tree(TARGET_DIRECTORY) as path:
                store.check_target(path)
        except StoreCorruptError as error:
            yield str(error)
    yield from check_views(store.place)
    yield from check_rejects(store.place)
    for file in store.place.names(INDEX_DIRECTORY):
        if not is_whole(store.place, file):
            name = store.place.name_of(f"{INDEX_DIRECTORY}/{file}")
            yield f"{name}: damaged. It is a cache and is not used; delete it."


def _verify_unit(store: FeatureStore, record: CommitRecord) -> None:
    check_sizes(store, record)
    with store.local_part(record) as path:
        check_metadata(store, record, path)
        _verify_content(store, record, path)
    store.place.release_tree(store.part_key(record))


def _verify_content(store: FeatureStore, record: CommitRecord, path: Path) -> None:
    part = store.part_path(record)
    how_to_mend = f"Delete {store.commit_path(record.unit)} and rerun `specx extract`."
    for stored in record.objects:
        found = file_hash(inside(path, stored.key))
        if found != stored.xxh128:
            raise StoreCorruptError(
                f"{part}/{stored.key}: its hash is {found}, the commit record says {stored.xxh128}. {how_to_mend}"
            )
    columns = record.sequences
    offsets = np.concatenate([[0], np.cumsum(columns.lengths)])
    table = np.frombuffer(bytes.fromhex("".join(columns.ids)), np.uint8).reshape(len(columns.ids), -1)
    stored_offsets, stored_table = (np.asarray(zarr.open_array(path / name, mode="r")) for name in SEQUENCE_TABLE)
    if not np.array_equal(stored_offsets, offsets) or not np.array_equal(stored_table, table):
        raise StoreCorruptError(f"{part}: its sequence table is not the commit record's. {how_to_mend}")
    input_ids = np.empty(offsets[-1], np.int32)
    PartReader(path, store.info, int(offsets[-1]), part).read("input_ids", 0, input_ids)
    for identifier, start, stop in zip(columns.ids, offsets[:-1], offsets[1:], strict=True):
        if sequence_id(input_ids[start:stop]).hex() != identifier:
            raise StoreCorruptError(f"{part}: tokens {start}:{stop} are not sequence {identifier}. {how_to_mend}")
