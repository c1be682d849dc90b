"""Answers in a Parquet file, gathered in durable pieces so that a killed run loses few.

Pieces lie in ``<file>.pieces/`` and are published whole, each with the settings it was made with.
When all is answered they are merged with what the file had before, under a temporary name, and the
file is replaced. A row of the data has one answer, whatever happened on the way.
"""

import fcntl
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ... import SpecxError
from ...storage.backends.durable import TEMPORARY_PREFIX, disk_errors, fsync_directory, publish, temporary_name
from ...storage.errors import StoreCorruptError
from ...storage.schema import Record, TargetIdentity, differences, parse_record
from .answer_paths import pieces_directory
from .sampler import Answer

_METADATA_KEY = b"specx.regenerate"
_LOCK_FILE = "lock"
_BATCH_ROWS = 1024
_ROW_GROUP_ROWS = 8192

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("reasoning_effort", pa.string()),
        ("date", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
    ]
)
"""``input_ids`` are prompt and answer, ``loss_mask`` is 1 on the answer."""


class AnswersError(SpecxError):
    """The file cannot be written as asked."""


class AnswerSettings(Record):
    """What all answers of a file have in common."""

    format: int = 1
    target: TargetIdentity
    dtype: str
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    max_length: int
    seed: int
    reasoning_effort: str | None
    date: str
    """YYYY-MM-DD, of rows that name none"""


def read_settings(path: Path) -> AnswerSettings | None:
    """Return the settings of the answers there are, in the file or in pieces; None if there are none.

    Raises AnswersError if the file is not of this kind, or if it or a piece is damaged.
    """
    if path.exists():
        return _settings_of(path, "Choose another --out.")
    pieces = _piece_paths(path)
    return _settings_of(pieces[0], "Delete it and rerun: its answers are made again.") if pieces else None


class AnswerFile:
    """One output file while a run adds to it; use it as a context manager, which makes durable what was added."""

    def __init__(self, path: Path, settings: AnswerSettings, *, answers_per_piece: int) -> None:
        """Raises AnswersError if the file was begun with other settings."""
        _require_settings(path, settings)
        self._path = path
        self._settings = settings
        self._answers_per_piece = answers_per_piece
        self._pieces = pieces_directory(path)
        self._schema = SCHEMA.with_metadata({_METADATA_KEY: settings.model_dump_json().encode()})
        self._pending: list[dict[str, Any]] = []
        self._lock = -1
        self._done: defaultdict[str, set[int]] = defaultdict(set)

    def __enter__(self) -> Self:
        """Raises AnswersError if another run writes the file."""
        with disk_errors(self._path):
            self._pieces.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._pieces / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._lock)
                raise AnswersError(f"{self._path}: another run is writing it. Wait for its end.") from error
        try:
            # Another run may have begun or finished the file before the lock was had.
            _require_settings(self._path, self._settings)
            with disk_errors(self._path):
                for leftover in self._pieces.glob(f"{TEMPORARY_PREFIX}*"):
                    leftover.unlink()
                self._learn_what_is_done()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            if not _piece_paths(self._path):
                shutil.rmtree(self._pieces, ignore_errors=True)
            # Ends the lock too.
            os.close(self._lock)

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether the row of a source, by its number there, is answered."""
        source, row = key
        return row in self._done.get(source, ())

    def add(self, answer: Answer, text: str) -> None:
        """Add an answer and what its ids say; it is durable after the next flush at the latest."""
        prompt = answer.prompt
        self._pending.append(
            {
                "id": prompt.identifier,
                "category": prompt.category,
                "messages": list(prompt.messages),
                "input_ids": [*prompt.input_ids.tolist(), *answer.sampled.tolist()],
                "loss_mask": [0] * len(prompt.input_ids) + [1] * len(answer.sampled),
                "finish_reason": answer.finish_reason,
                "text": text,
                "reasoning_effort": prompt.reasoning_effort,
                "date": prompt.date,
                "source": prompt.source,
                "row": prompt.row,
            }
        )
        self._done[prompt.source].add(prompt.row)
        if len(self._pending) >= self._answers_per_piece:
            self.flush()

    def flush(self) -> None:
        """Make durable what is pending."""
        if not self._pending:
            return
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self._pending, schema=self._schema), buffer)
        with disk_errors(self._path):
            publish(self._pieces / f"{uuid.uuid4().hex}.parquet", buffer.getvalue().to_pybytes())
        self._pending = []

    def finish(self) -> None:
        """Bring everything together in the one file."""
        self.flush()
        pieces = _piece_paths(self._path)
        if pieces or not self._path.exists():
            # In the directory of the pieces, so that one which a killed run left goes with it.
            temporary = temporary_name(self._pieces / self._path.name)
            try:
                with disk_errors(self._path):
                    self._merge([self._path, *pieces] if self._path.exists() else pieces, temporary)
                    temporary.rename(self._path)
                    fsync_directory(self._path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        shutil.rmtree(self._pieces)

    def _merge(self, parts: list[Path], temporary: Path) -> None:
        with temporary.open("xb") as file:
            with pq.ParquetWriter(file, self._schema) as writer:
                gathered: list[pa.RecordBatch] = []
                for part in parts:
                    for batch in _batches(part, SCHEMA.names):
                        gathered.append(batch)
                        if sum(each.num_rows for each in gathered) >= _ROW_GROUP_ROWS:
                            writer.write_table(pa.Table.from_batches(gathered, SCHEMA))
                            gathered = []
                if gathered:
                    writer.write_table(pa.Table.from_batches(gathered, SCHEMA))
            file.flush()
            os.fsync(file.fileno())

    def _learn_what_is_done(self) -> None:
        for source, row in _keys(self._path) if self._path.exists() else ():
            self._done[source].add(row)
        for piece in _piece_paths(self._path):
            keys = list(_keys(piece))
            if any(key in self for key in keys):
                # Merged before the run that made it was killed: the file has it.
                piece.unlink()
                continue
            for source, row in keys:
                self._done[source].add(row)


def _require_settings(path: Path, settings: AnswerSettings) -> None:
    found = read_settings(path)
    if found is not None and (differing := differences(found, settings, "in the file")):
        raise AnswersError(
            f"{path}: begun with other settings: {'; '.join(differing)}. Use another --out, or the same settings."
        )


def _settings_of(path: Path, what_to_do: str) -> AnswerSettings:
    try:
        metadata = pq.read_schema(path).metadata or {}
        return parse_record(AnswerSettings, metadata[_METADATA_KEY], str(path))
    except (pa.ArrowException, OSError, KeyError, StoreCorruptError) as error:
        raise AnswersError(f"{path}: not written by `specx regenerate`, or damaged. {what_to_do}") from error


def _piece_paths(path: Path) -> list[Path]:
    found = pieces_directory(path).glob("*.parquet")
    return sorted(piece for piece in found if not piece.name.startswith(TEMPORARY_PREFIX))


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                yield batch.replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise AnswersError(f"{path}: damaged ({reason}). Delete it and rerun: its answers are made again.") from error


def _keys(path: Path) -> Iterator[tuple[str, int]]:
    for batch in _batches(path, ["source", "row"]):
        yield from zip(batch["source"].to_pylist(), batch["row"].to_pylist(), strict=True)
