"""Reading every byte of a store against what was committed."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr

from .errors import StoreCorruptError, StoreError
from .files import file_hash, inside
from .hashing import sequence_id
from .part import SEQUENCE_TABLE
from .reader import PartReader, check_metadata, check_sizes
from .schema import CommitRecord
from .store import COMMITS_DIRECTORY, PARTS_DIRECTORY, FeatureStore


@dataclass(kw_only=True, slots=True)
class Verification:
    """What ``store verify`` found."""

    sequences: int = 0
    tokens: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """A line each; empty for a sound store."""
    unreferenced: list[str] = field(default_factory=list)
    """Parts and temporary files that no record names: leftovers of killed runs, harmless."""


def verify(store: FeatureStore) -> Verification:
    """Check every record, file, checksum and sequence of a store."""
    result = Verification()
    seen: dict[str, int] = {}
    named = {record.part for record in store.records.values()}
    for unit, record in sorted(store.records.items()):
        try:
            _verify_unit(store, record)
        except StoreCorruptError as error:
            result.problems.append(str(error))
            continue
        for identifier in record.sequences.ids:
            if identifier in seen:
                result.problems.append(
                    f"{store.commit_path(unit)}: sequence {identifier} is committed twice, first in unit "
                    f"{seen[identifier]}."
                )
            seen[identifier] = unit
        result.sequences += len(record.sequences.ids)
        result.tokens += sum(record.sequences.lengths)
        result.bytes += sum(stored.size for stored in record.objects)
    for folder, is_published in ((PARTS_DIRECTORY, named.__contains__), (COMMITS_DIRECTORY, _is_record)):
        result.unreferenced += [f"{folder}/{name}" for name in store.place.names(folder) if not is_published(name)]
    return result


def require_sound(store: FeatureStore, result: Verification) -> None:
    """Raise StoreError, one line, if anything is wrong."""
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise StoreError(f"{store.root}: {len(result.problems)} damaged: {result.problems[0]}{more}")


def _is_record(name: str) -> bool:
    return name.startswith("u") and name.endswith(".json")


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
