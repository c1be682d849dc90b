"""Rows of a data set -> samples, or rejects with a reason. No row is lost without a word.

A row is one generation of the target, told by its columns: token ids
(``input_ids``, ``loss_mask``), which win where both are there because they are
exactly what was sampled, or a conversation (``conversations`` or ``messages``).

Shapes: T tokens of one sample.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from .. import SpecxError
from ..storage.schema import Array, Reject
from ..storage.writer import Origin
from .chat import ChatRenderer, NotRenderedError
from .config import ExtractConfig
from .target import Target

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_CONVERSATION_COLUMNS = ("conversations", "messages")
_EXPECTED = "input_ids and loss_mask, or conversations, or messages"


# Its own error lines would stand beside ours.
datasets.logging.set_verbosity(logging.CRITICAL)


class DataError(SpecxError):
    """The data cannot be read at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sequence for the target."""

    input_ids: Array
    """(T,) int32"""
    loss_mask: Array
    """(T,) uint8, 1 on the tokens the target sampled"""
    origin: Origin


class _RejectedRowError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class SampleReader:
    """Turns the rows of some files into samples, in order."""

    def __init__(self, config: ExtractConfig, target: Target) -> None:
        self._config = config
        self._target = target
        self._max_length = min(config.max_length or target.max_length, target.max_length)
        self._renderer: ChatRenderer | None = None

    def __iter__(self) -> Iterator[Sample | Reject]:
        """Yield one sample or reject a row; raise DataError if a file is unreadable or has no rows."""
        remaining = self._config.limit
        for source in self._config.data:
            for row, columns in enumerate(_rows(source)):
                if remaining == 0:
                    return
                remaining = None if remaining is None else remaining - 1
                yield self._convert(source, row, columns)

    def _convert(self, source: str, row: int, columns: Mapping[str, Any]) -> Sample | Reject:
        try:
            input_ids, loss_mask = self._checked(*self._tokens(columns))
        except _RejectedRowError as error:
            return Reject(source=source, row=row, reason=error.reason, detail=error.detail)
        origin = Origin(source=source, row=row, category=str(columns.get("category") or ""))
        return Sample(input_ids=input_ids, loss_mask=loss_mask, origin=origin)

    def _tokens(self, columns: Mapping[str, Any]) -> tuple[Array, Array]:
        if columns.get("status") not in (None, "success"):
            raise _RejectedRowError("not_successful", f"status is {columns['status']!r}")
        if columns.get("input_ids") is not None and columns.get("loss_mask") is not None:
            return _integers("input_ids", columns["input_ids"]), _integers("loss_mask", columns["loss_mask"])
        messages = next((columns[name] for name in _CONVERSATION_COLUMNS if columns.get(name)), None)
        if messages is None:
            raise _RejectedRowError("empty", f"no {_EXPECTED} in the row")
        if self._renderer is None:
            self._renderer = ChatRenderer(self._target.path)
        try:
            return self._renderer.render(messages)
        except NotRenderedError as error:
            raise _RejectedRowError("not_rendered", str(error)) from error

    def _checked(self, input_ids: Array, loss_mask: Array) -> tuple[Array, Array]:
        vocab_size = self._target.vocab_size
        if len(input_ids) < 2:
            raise _RejectedRowError("empty", f"{len(input_ids)} tokens, expected at least 2")
        if len(loss_mask) != len(input_ids):
            raise _RejectedRowError("mask_length", f"{len(loss_mask)} mask entries for {len(input_ids)} tokens")
        if not np.isin(loss_mask, (0, 1)).all():
            raise _RejectedRowError("mask_value", "the mask has entries other than 0 and 1")
        if input_ids.min() < 0 or input_ids.max() >= vocab_size:
            worst = int(input_ids.max() if input_ids.max() >= vocab_size else input_ids.min())
            raise _RejectedRowError("id_out_of_range", f"token id {worst}, the target's vocabulary has {vocab_size}")
        if len(input_ids) > self._max_length:
            if self._config.too_long == "reject":
                raise _RejectedRowError("too_long", f"{len(input_ids)} tokens, the limit is {self._max_length}")
            input_ids, loss_mask = input_ids[: self._max_length], loss_mask[: self._max_length]
        if not loss_mask.any():
            raise _RejectedRowError("nothing_supervised", f"none of {len(input_ids)} tokens is the target's own")
        return input_ids.astype(np.int32), loss_mask.astype(np.uint8)


def _integers(name: str, values: Any) -> Array:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray(values, object)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iub"):
        raise _RejectedRowError("not_integers", f"{name} is not a list of integers")
    return array.astype(np.int64)


def _rows(source: str) -> Iterator[Mapping[str, Any]]:
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file. Give --data a Parquet or JSON-lines file.")
    if path.suffix not in _FORMATS:
        raise DataError(f"{source}: ends in {path.suffix!r}, expected one of {', '.join(_FORMATS)}.")
    if not path.stat().st_size:
        raise DataError(f"{source}: the file is empty, expected rows with {_EXPECTED}.")
    count = 0
    try:
        if path.suffix == ".parquet" and not pq.read_metadata(path).num_rows:
            raise DataError(f"{source}: no rows, expected some with {_EXPECTED}.")
        rows = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
        for row in rows:
            if count == 0:
                _require_known_columns(source, row)
            count += 1
            yield row
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise DataError(f"{source}: row {count} cannot be read: {reason}. Write the file again.") from error
    if count == 0:
        raise DataError(f"{source}: no rows, expected some with {_EXPECTED}.")


def _require_known_columns(source: str, row: Mapping[str, Any]) -> None:
    known = {"input_ids", "loss_mask"} <= set(row) or any(name in row for name in _CONVERSATION_COLUMNS)
    if not known:
        raise DataError(f"{source}: unknown columns {', '.join(sorted(row))}; expected {_EXPECTED}.")
