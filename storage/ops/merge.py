"""``store merge``: several stores of one target in one.

A part whose sequences are all new is taken as it is, by hard links or copied; what
is in the other store already is left out. Merging again adds what has come since.
"""

from dataclasses import dataclass
from pathlib import Path

from ..backends.local import LocalPlace
from ..catalog.rejects import RejectLog, read_rejects
from ..catalog.views import copy_views
from ..errors import StoreError
from ..reader import FeatureReader, check_metadata, check_sizes
from ..schema import CommitRecord, Origin
from ..store import FeatureStore
from ..writer import FeatureWriter
from .config import MergeConfig


@dataclass(kw_only=True, slots=True)
class Merged:
    """What a merge did."""

    sequences: int = 0
    """Added."""
    reused: int = 0
    """Sequences that were there already."""
    whole_parts: int = 0
    """Taken as they are."""


def run(config: MergeConfig) -> Merged:
    """Add stores to another, which is created if there is none."""
    sources = [FeatureStore.open(source) for source in config.sources]
    into = FeatureStore.create(config.into, sources[0].info)
    return merge(sources, into, link=config.link, tokens_per_part=config.tokens_per_part)


def merge(sources: list[FeatureStore], into: FeatureStore, *, link: bool, tokens_per_part: int) -> Merged:
    """Add the sequences, views and rejects of some stores to another of the same target and settings.

    ``link`` shares the files of parts between the stores, which is safe, as they never change, and needs
    all on one local file system. Raises StoreError, StoreMismatchError if the stores are not of one kind.
    """
    for source in sources:
        into.info.require_same(source.info, into.root)
        if source.root == into.root:
            raise StoreError(f"{into.root}: a store cannot be merged into itself. Choose another --into.")
        if link and not (isinstance(source.place, LocalPlace) and isinstance(into.place, LocalPlace)):
            raise StoreError(f"{source.root}: files can be linked on a local disk only. Merge without --link.")
    result = Merged()
    for source in sources:
        copy_target(source, into)
        with FeatureWriter(into, tokens_per_part=tokens_per_part) as writer:
            for unit in sorted(source.records):
                _add_unit(source, source.records[unit], writer, result, link=link)
        result.sequences += writer.committed_sequences
        copy_beside(source, into)
    into.records.save_index()
    return result


def copy_target(source: FeatureStore, into: FeatureStore) -> None:
    """Give a store what another has of the target, unless it has it."""
    if into.has_target or not source.has_target:
        return
    directory = source.target_directory
    with into.new_target() as copy:
        for file in directory.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())


def copy_beside(source: FeatureStore, into: FeatureStore) -> None:
    """Add the views and rejects of a store to those of another."""
    copy_views(source.place, into.place)
    with RejectLog(into.place) as rejects:
        for reject in read_rejects(source.place):
            rejects.add(reject)


def origins(record: CommitRecord) -> list[Origin]:
    """Return where each sequence of a commit came from."""
    columns = record.sequences
    return [
        Origin(source=source, row=row, category=category)
        for source, row, category in zip(columns.sources, columns.rows, columns.categories, strict=True)
    ]


def _add_unit(source: FeatureStore, record: CommitRecord, writer: FeatureWriter, result: Merged, *, link: bool) -> None:
    known = [bytes.fromhex(each) in writer for each in record.sequences.ids]
    result.reused += sum(known)
    if all(known):
        return
    if not any(known):
        check_sizes(source, record)
        with source.local_part(record) as path:
            check_metadata(source, record, path)
            _adopt(writer, record, path, link=link)
        result.whole_parts += 1
        return
    reader = FeatureReader(source, [record.unit])
    for number, origin in enumerate(origins(record)):
        if not known[number]:
            writer.add(reader.features(number), origin)


def _adopt(writer: FeatureWriter, record: CommitRecord, path: Path, *, link: bool) -> None:
    try:
        writer.adopt(record, path, origins(record), link=link)
    except OSError as error:
        if not link:
            raise
        raise StoreError(f"{path}: cannot be linked ({error.strerror}). Merge without --link.") from error
