"""How many sequences and tokens some data give, told from the first rows of its files.

Whole files are read only where that is cheap or they are small, and then the count is exact but for rows
that would be rejected and sequences that occur twice.

Shapes: S sequences looked at.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...storage.schema import Array, Reject
from ..config import ExtractConfig
from ..target import Target
from .samples import SampleReader
from .sources import DataError, Source, find_sources, one_line

_SOURCES_OPENED = 8
"""Of many files, the first rows of so many are looked at, and stand for the others."""

_GZIP_BYTES = 1 << 20
"""So much of a compressed file is read to estimate its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """What the rows of a run are, or are expected to be."""

    rows: int
    """Of the data that the run's ``limit`` and ``shard`` let through."""
    rows_seen: int
    """Of these, those whose sequences were counted."""
    sequences: int
    tokens: int
    lengths: Array
    """(S,) int64, tokens of each sequence that was counted, in the order of the rows"""

    @property
    def is_exact(self) -> bool:
        """Whether every row was looked at."""
        return self.rows_seen == self.rows

    @property
    def basis(self) -> str:
        """What the numbers rest on, in words."""
        if self.is_exact:
            return f"counted in all {self.rows:,} rows"
        return f"estimated from {self.rows_seen:,} of about {self.rows:,} rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """The rows of one source, from the first on, that ``limit`` lets through."""

    source: Source
    start: int
    """Number of its first row, counted over all data."""
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What the first rows of a source gave."""

    rows: int
    numbers: Array
    """(S,) row within the source of each sequence"""
    lengths: Array
    """(S,) tokens"""


def count(config: ExtractConfig, target: Target, *, sample_rows: int, whole_bytes: int = 0) -> Count | None:
    """Return what a run would read, or None if nobody can tell how many rows there are.

    ``sample_rows`` rows of a source are converted as the run would do it, those of at most eight sources;
    in Parquet files of up to ``whole_bytes`` all recorded token ids are counted. ``target`` needs no weights.
    Raises DataError as the run would.
    """
    spans = _spans(config, sample_rows)
    if spans is None:
        return None
    opened = {round(index) for index in np.linspace(0, len(spans) - 1, min(len(spans), _SOURCES_OPENED))}
    looks: dict[int, _Look] = {}
    for index, span in enumerate(spans):
        look = _every_length(config, target, span, whole_bytes)
        if look is None and index in opened:
            look = _first_rows(config, target, span, sample_rows)
        if look is not None:
            looks[index] = look
    return _total(config, spans, looks)


def _total(config: ExtractConfig, spans: list[_Span], looks: dict[int, _Look]) -> Count:
    shard, of = config.shard or (0, 1)
    sampled = sum(look.rows for look in looks.values())
    pooled = np.concatenate([look.lengths for look in looks.values()])
    rows = rows_seen = 0
    sequences = tokens = 0.0
    counted = []
    for index, span in enumerate(spans):
        share = len(range((shard - span.start) % of, span.rows, of))
        seen, lengths, rate = 0, pooled, share / max(sampled, 1)
        if look := looks.get(index):
            seen = len(range((shard - span.start) % of, look.rows, of))
            counted.append(look.lengths[(span.start + look.numbers) % of == shard])
            # Rows of the other shards are as good for an average.
            lengths, rate = (counted[-1], 1.0) if seen == share else (look.lengths, share / look.rows)
        rows += share
        rows_seen += seen
        sequences += rate * len(lengths)
        tokens += rate * int(lengths.sum())
    return Count(
        rows=rows,
        rows_seen=rows_seen,
        sequences=round(sequences),
        tokens=round(tokens),
        lengths=np.concatenate(counted),
    )


def _spans(config: ExtractConfig, sample_rows: int) -> list[_Span] | None:
    spans: list[_Span] = []
    start = 0
    for source in [source for argument in config.data for source in find_sources(argument)]:
        remaining = None if config.limit is None else config.limit - start
        if remaining == 0:
            break
        rows = _rows_in(source, sample_rows)
        if rows is None and remaining is None:
            return None
        # Of a source of unknown length the limit is what is expected of it.
        rows = min(each for each in (rows, remaining) if each is not None)
        spans.append(_Span(source=source, start=start, rows=rows))
        start += rows
    return spans


def _rows_in(source: Source, sample_rows: int) -> int | None:
    """Return the number of rows of a source, estimated if it has over ``sample_rows``; None if only reading tells."""
    path = Path(source.name)
    if not path.is_file():
        return None
    try:
        if path.suffix == ".parquet":
            return int(pq.read_metadata(path).num_rows)
        return _rows_of_json(path, source, sample_rows)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {one_line(str(error))}. Write the file again.") from error


def _rows_of_json(path: Path, source: Source, sample_rows: int) -> int:
    is_gzip = path.suffix == ".gz"
    with path.open("rb") as file:
        lines: Any = gzip.GzipFile(fileobj=file) if is_gzip else file
        rows = 0
        for line in lines:
            if not rows and line.lstrip().startswith(b"[") and path.name.removesuffix(".gz").endswith(".json"):
                # One array: a run reads it whole as well.
                return sum(1 for _ in source.read())
            rows += bool(line.strip())
            # The reader of a compressed file is some buffers ahead of the line it gives.
            if rows > sample_rows and (not is_gzip or file.tell() >= _GZIP_BYTES):
                return max(rows, round(rows * path.stat().st_size / file.tell()))
    return rows


def _first_rows(config: ExtractConfig, target: Target, span: _Span, sample_rows: int) -> _Look:
    rows = min(span.rows, sample_rows)
    settings = config.model_copy(update={"data": (span.source.name,), "limit": rows, "shard": None})
    found = [
        (sample.origin.row, len(sample.input_ids))
        for sample in SampleReader(settings, target)
        if not isinstance(sample, Reject)
    ]
    numbers, lengths = np.asarray(found, np.int64).reshape(-1, 2).T
    return _Look(rows=rows, numbers=numbers, lengths=lengths)


def _every_length(config: ExtractConfig, target: Target, span: _Span, whole_bytes: int) -> _Look | None:
    """Return the lengths of all rows of a Parquet file whose every row has recorded token ids, else None."""
    path = Path(span.source.name)
    names = config.input_ids_column or "input_ids", config.loss_mask_column or "loss_mask"
    if not path.is_file() or path.suffix != ".parquet" or path.stat().st_size > whole_bytes:
        return None
    with pq.ParquetFile(path) as file:
        if not set(names) <= set(file.schema_arrow.names) or not _is_list(file.schema_arrow.field(names[0]).type):
            return None
        found = np.concatenate([np.zeros(0), *_lengths(file, names[0], span.rows)])[: span.rows]
    if np.isnan(found).any():
        return None
    longest = min(config.max_length or target.max_length, target.max_length)
    lengths = np.minimum(found, longest) if config.too_long == "truncate" else found
    numbers = np.flatnonzero((lengths >= 2) & (lengths <= longest))
    return _Look(rows=span.rows, numbers=numbers, lengths=lengths[numbers].astype(np.int64))


def _lengths(file: pq.ParquetFile, name: str, rows: int) -> Iterator[Array]:
    """Yield float64 lengths of the lists of one column until there are ``rows``; NaN where there is no list."""
    done = 0
    for batch in file.iter_batches(columns=[name]):
        yield pc.list_value_length(batch.column(0)).to_numpy(zero_copy_only=False).astype(np.float64)
        done += batch.num_rows
        if done >= rows:
            return


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
