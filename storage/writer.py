"""Adding sequences to a store, exactly once, whatever happens meanwhile.

The commit records are a log: number n + 1 is published only by a writer that has
read all up to n and holds none of their sequences. Whoever loses the race for a
number looks again, drops what the winner already has, and takes the next.
"""

import os
import shutil
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from .. import __version__
from .backends.durable import inside
from .catalog.sequence_id import names_of, sequence_id
from .parts.part_writer import AdoptedPart, PartWriter
from .reader import PartReader
from .schema import CommitRecord, Origin, Reject, SequenceColumns, SequenceFeatures, StoredObject
from .store import PARTS_DIRECTORY, FeatureStore


class FeatureWriter:
    """Writes units of whole sequences; use it as a context manager.

    Leaving the block normally commits the unit in progress; leaving it by an exception
    drops that unit and keeps every one committed before.
    """

    def __init__(self, store: FeatureStore, *, tokens_per_part: int) -> None:
        """A unit is committed once it has ``tokens_per_part`` tokens; no sequence is split."""
        self._store = store
        self._place = store.place
        self._tokens_per_part = tokens_per_part
        self._known: set[bytes] = set()
        self._seen_units: set[int] = set()
        self._learn_commits()
        self._part: PartWriter | AdoptedPart | None = None
        self._ids: list[bytes] = []
        self._lengths: list[int] = []
        self._origins: list[Origin] = []
        self._rejected: list[Reject] = []
        self._untaken: list[bytes] = []
        self.committed_sequences = 0
        self.committed_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()

    def __contains__(self, identifier: bytes) -> bool:
        """Whether a sequence is committed or in the unit in progress."""
        return identifier in self._known

    def add(self, features: SequenceFeatures, origin: Origin) -> None:
        """Add a sequence, unless it is already there; commit the unit once it is full."""
        identifier = sequence_id(features.input_ids)
        if identifier in self._known:
            return
        with self._place.write_errors():
            if self._part is None:
                self._part = PartWriter(self._fresh_part(), self._store.info)
            assert isinstance(self._part, PartWriter), "an adopted part is committed at once"
            self._part.append(features)
        self._known.add(identifier)
        self._ids.append(identifier)
        self._lengths.append(len(features.input_ids))
        self._origins.append(origin)
        if self._part.tokens >= self._tokens_per_part:
            self.commit()

    def adopt(self, record: CommitRecord, path: Path, origins: list[Origin], *, link: bool) -> None:
        """Commit a whole part of another store, at ``path``, in a unit of its own; none of it may be here already.

        Its files are copied, or linked where that is possible. Raises OSError where they cannot be linked.
        """
        self.commit()
        with self._place.write_errors():
            copy = self._fresh_part()
            self._part = AdoptedPart(copy, record)
            for stored in record.objects:
                file = inside(copy, stored.key)
                file.parent.mkdir(parents=True, exist_ok=True)
                if link:
                    os.link(inside(path, stored.key), file)
                else:
                    shutil.copyfile(inside(path, stored.key), file)
        self._ids = [bytes.fromhex(each) for each in record.sequences.ids]
        self._known.update(self._ids)
        self._lengths, self._origins = list(record.sequences.lengths), origins
        self.commit()

    def reject(self, reject: Reject) -> None:
        """Note a row that gave no sequence in the record of the unit in progress."""
        self._rejected.append(reject)

    def take_committed(self) -> list[bytes]:
        """Return the ids of the sequences this writer committed since the last call."""
        taken, self._untaken = self._untaken, []
        return taken

    def commit(self) -> None:
        """Make the unit in progress visible; nothing happens if it is empty."""
        with self._place.write_errors():
            objects = self._part.close(self._ids) if self._part else ()
            is_put = False
            while part := self._part:
                if taken := self._learn_commits() & set(self._ids):
                    self._keep_only([i for i, identifier in enumerate(self._ids) if identifier not in taken])
                    objects = self._part.close(self._ids) if self._part else ()
                    is_put = False
                elif not is_put:
                    self._place.put_tree(_key(part))
                    # That may have taken long: look again at what others committed before trying a number.
                    is_put = True
                else:
                    self._publish(part, objects)
        self._ids, self._lengths, self._origins, self._rejected = [], [], [], []

    def _publish(self, part: PartWriter | AdoptedPart, objects: tuple[StoredObject, ...]) -> None:
        """Commit the part in progress, or leave it as it is if another writer took its number."""
        record = self._record(part, objects)
        # From here on the part may be visible, and whatever happens must not remove it.
        self._part = None
        try:
            is_ours = self._place.publish(self._store.commit_key(record.unit), record.to_bytes())
        except BaseException:
            self._place.release_tree(_key(part))
            raise
        if not is_ours:
            self._part = part
            return
        self._store.records.add(record)
        self._seen_units.add(record.unit)
        self.committed_sequences += len(self._ids)
        self._untaken += self._ids
        self.committed_tokens += part.tokens
        self._place.release_tree(_key(part))

    def _record(self, part: PartWriter | AdoptedPart, objects: tuple[StoredObject, ...]) -> CommitRecord:
        return CommitRecord(
            unit=self._next_unit(),
            part=part.path.name,
            sequences=SequenceColumns(
                ids=tuple(identifier.hex() for identifier in self._ids),
                lengths=tuple(self._lengths),
                categories=tuple(origin.category for origin in self._origins),
                sources=tuple(origin.source for origin in self._origins),
                rows=tuple(origin.row for origin in self._origins),
            ),
            rejected=tuple(self._rejected),
            objects=objects,
            quantization_error=part.quantization_error,
            writer=f"specx {__version__} {socket.gethostname()}:{os.getpid()}",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        ).sealed()

    def _learn_commits(self) -> set[bytes]:
        """Take note of what was committed since the last look, and return its sequences."""
        self._store.refresh()
        fresh = self._store.records.keys() - self._seen_units
        identifiers = set(names_of(self._store.catalogue(fresh).ids))
        self._seen_units |= fresh
        self._known |= identifiers
        return identifiers

    def _keep_only(self, kept: list[int]) -> None:
        """Replace the part in progress, already closed, by one with only some of its sequences."""
        assert self._part is not None
        old, ends = self._part, np.cumsum(self._lengths).tolist()
        reader = PartReader(old.path, self._store.info, old.tokens)
        self._part = fewer = PartWriter(self._fresh_part(), self._store.info) if kept else None
        for i in kept:
            assert fewer is not None
            fewer.append(reader.features(ends[i] - self._lengths[i], ends[i]))
        self._place.delete_tree(_key(old))
        self._ids = [self._ids[i] for i in kept]
        self._lengths = [self._lengths[i] for i in kept]
        self._origins = [self._origins[i] for i in kept]

    def discard(self) -> None:
        """Drop the unit in progress."""
        if self._part is not None:
            self._place.delete_tree(_key(self._part))
            self._part = None

    def _next_unit(self) -> int:
        return max(self._store.records, default=-1) + 1

    def _fresh_part(self) -> Path:
        name = f"u{self._next_unit():06d}-{uuid.uuid4().hex}.zarr"
        return self._place.begin_tree(f"{PARTS_DIRECTORY}/{name}")


def _key(part: PartWriter | AdoptedPart) -> str:
    return f"{PARTS_DIRECTORY}/{part.path.name}"
