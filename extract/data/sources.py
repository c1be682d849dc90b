"""Data sets -> rows, one at a time, each with the file or split it is from and its number there.

An argument names a file, a directory (all data files in it), a pattern, or splits of a data set, which
is a hub id or a directory whose README declares them. Nothing is held in memory but a batch of rows.

JSON lines are read here and not by ``datasets``: its reader gives a column one type per block, so that
one odd value would change or lose the rows beside it. Here each line is judged by itself.
"""

import glob
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import pyarrow.parquet as pq

from ... import SpecxError

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
"""Of the files that are read."""

_LEADING_ROWS = 100
"""So many rows may be bad before one is good; then the file is taken for something else."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPLITS = re.compile(r"(?P<path>[^:]+)(?::(?:(?P<config>[^:/,]+)/)?(?P<splits>[^:/]+))?")
_READ_ERRORS = (ValueError, OSError, EOFError, zlib.error, datasets.exceptions.DatasetsError)


# Its own error lines would stand beside ours.
datasets.logging.set_verbosity(logging.CRITICAL)


class DataError(SpecxError):
    """The data cannot be read at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a data set."""

    source: str
    """The file, or the data set and split, such as ``org/name:chat``."""
    number: int
    """From 0, within the source; blank lines are none."""
    columns: Mapping[str, Any]
    unreadable: str = ""
    """Why the row is not one; then it has no columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file, or one split of a data set; not yet opened."""

    name: str
    read: Callable[[], Iterable[Mapping[str, Any] | str]]
    """Gives the columns of each row, or why there are none."""


def find_sources(argument: str) -> list[Source]:
    """Return the files or splits that one ``--data`` names, files in sorted order.

    Raises DataError if there are none, a file is of another kind, or the hub cannot be reached.
    """
    path = Path(argument)
    if path.is_file():
        return [_file(path)]
    if argument and path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
        # A directory fetched from the hub has notes about the fetching in a hidden one.
        files = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise DataError(f"{argument}: no data files in it, expected some that end in {', '.join(SUFFIXES)}.")
        return [_file(file) for file in sorted(files)]
    if glob.has_magic(argument):
        matches = [Path(match) for match in glob.glob(argument, recursive=True)]  # noqa: PTH207 - may be absolute
        if not any(match.is_file() for match in matches):
            raise DataError(f"{argument}: no file matches this pattern.")
        return [_file(match) for match in sorted(matches) if match.is_file()]
    return _splits(argument)


def rows(source: Source, fits: Callable[[Mapping[str, Any]], bool], expected: str) -> Iterator[Row]:
    """Yield every row of a source in order, those that cannot be read included.

    ``fits`` says whether columns are some the caller can read, ``expected`` names those. Raises
    DataError if the source is empty, breaks off, or none of its first rows fits.
    """
    path = Path(source.name)
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{source.name}: the file is empty, expected rows with {expected}.")
    found = _numbered(source)
    leading: list[Row] = []
    for row in found:
        leading.append(row)
        if not row.unreadable and fits(row.columns):
            yield from chain(leading, found)
            return
        if len(leading) == _LEADING_ROWS:
            break
    if not leading:
        raise DataError(f"{source.name}: no rows, expected some with {expected}.")
    readable = next((row for row in leading if not row.unreadable), None)
    if readable is None:
        raise DataError(f"{source.name}: row 0 cannot be read: {leading[0].unreadable}. Write the file again.")
    columns = one_line(", ".join(sorted(readable.columns))) or "none"
    raise DataError(f"{source.name}: unknown columns {columns}; expected {expected}.")


def one_line(text: str) -> str:
    """Return text that fits in a message and can be written as UTF-8, which a row's own may not."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:200]


def _numbered(source: Source) -> Iterator[Row]:
    count = 0
    try:
        for columns in source.read():
            if isinstance(columns, str):
                yield Row(source=source.name, number=count, columns={}, unreadable=columns)
            else:
                yield Row(source=source.name, number=count, columns=columns)
            count += 1
    except _READ_ERRORS as error:
        reason = one_line(str(error.__cause__ or error))
        raise DataError(f"{source.name}: row {count} cannot be read: {reason}. Write the file again.") from error


def _json_rows(files: Iterable[str]) -> Iterator[Mapping[str, Any] | str]:
    """Yield columns, or why there are none, of every line that is not blank."""
    for file in files:
        with fsspec.open(file, "rb", compression="infer") as stream:
            lines = (line for line in stream if line.strip())
            first = next(lines, b"")
            if first.lstrip().startswith(b"[") and file.removesuffix(".gz").endswith(".json"):
                yield from map(_columns, json.loads(first + stream.read()))
            elif first:
                yield from map(_parsed, chain([first], lines))


def _parsed(line: bytes) -> Mapping[str, Any] | str:
    try:
        return _columns(json.loads(line.strip().decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return one_line(str(error))
    except (ValueError, RecursionError) as error:
        return f"JSON parse error: {one_line(str(error))}"


def _columns(value: Any) -> Mapping[str, Any] | str:
    return value if isinstance(value, dict) else f"a row is a JSON object, found {type(value).__name__}"


def _file(path: Path) -> Source:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}.")
    read = partial(_parquet_rows, path) if path.suffix == ".parquet" else partial(_json_rows, (str(path),))
    return Source(name=str(path), read=read)


def _parquet_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if not pq.read_metadata(path).num_rows:
        return ()
    # The name of a file is a pattern to this library.
    files = glob.escape(str(path))
    found: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True
    )
    return found


def _splits(argument: str) -> list[Source]:
    match = _SPLITS.fullmatch(argument)
    path = match["path"] if match else ""
    is_directory = bool(path) and Path(path).is_dir()
    if match is None or argument.endswith(SUFFIXES) or not (is_directory or _HUB_ID.fullmatch(path)):
        raise DataError(f"{argument}: no such file. Give --data a Parquet or JSON-lines file, or a hub id.")
    try:
        builder = _builder(argument, path, match["config"])
        found = builder.as_streaming_dataset()
    except ConnectionError as error:
        raise DataError(
            f"{argument}: no such file, and the hub cannot be reached: {one_line(str(error))}. "
            "Download the data set and give --data its directory."
        ) from error
    except _READ_ERRORS as error:
        raise DataError(
            f"{argument}: cannot be opened: {one_line(str(error.__cause__ or error)).rstrip('.')}."
        ) from error
    existing = [str(name) for name in found]
    wanted = match["splits"].split(",") if match["splits"] else existing
    if not set(wanted) <= set(existing) or (match["splits"] is None and len(existing) > 1):
        problem = f"no split {match['splits']}" if match["splits"] else "it has several splits"
        raise DataError(f"{argument}: {problem}; name some of {', '.join(existing)}, as in {path}:{existing[0]}.")
    prefix = f"{path}:{match['config']}/" if match["config"] else f"{path}:"
    sources = []
    for split in wanted:
        read: Callable[[], Iterable[Mapping[str, Any] | str]] = partial(iter, found[split])
        if builder.name == "json":
            read = partial(_json_rows, tuple(map(str, builder.config.data_files[split])))
        sources.append(Source(name=prefix + split, read=read))
    return sources


def _builder(argument: str, path: str, config: str | None) -> Any:
    existing = datasets.get_dataset_config_names(path)
    chosen = config or datasets.get_dataset_default_config_name(path)
    if chosen not in existing:
        problem = f"no configuration {config}" if config else "it has several configurations"
        raise DataError(f"{argument}: {problem}; name one of {', '.join(existing)}, as in {path}:{existing[0]}/SPLIT.")
    return datasets.load_dataset_builder(path, chosen)
