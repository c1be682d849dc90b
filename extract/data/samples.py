"""Rows of data sets -> samples, or rejects with a reason. No row is lost without a word.

A sample is one generation of the target: its prompt as it was served and what the target sampled. What
rows may look like is in ``row_formats``, where they may be in ``sources``.

Shapes: T tokens of one sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...storage.schema import Array, Origin, Reject
from ..config import ExtractConfig
from ..target import Target
from .chat_template import ChatRenderer, DateMissingError, NotRenderedError
from .row_formats import Conversation, Recorded, RejectedRowError, RowShape, day, level
from .sources import DataError, Row, find_sources, rows

__all__ = ["DataError", "Sample", "SampleReader"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sequence for the target."""

    input_ids: Array
    """(T,) int32"""
    loss_mask: Array
    """(T,) uint8, 1 on the tokens the target sampled"""
    origin: Origin


class SampleReader:
    """Turns the rows of the data into samples, in order."""

    def __init__(self, config: ExtractConfig, target: Target) -> None:
        self._config = config
        self._target = target
        self._max_length = min(config.max_length or target.max_length, target.max_length)
        self._shape = RowShape(
            messages=config.messages_column,
            input_ids=config.input_ids_column,
            loss_mask=config.loss_mask_column,
            category=config.category_column,
            turns=config.turns,
        )
        self._renderer: ChatRenderer | None = None

    def __iter__(self) -> Iterator[Sample | Reject]:
        """Yield a sample or a reject a row; with ``turns="all"`` one for each answer of the row.

        Of the rows that ``limit`` lets through, counted over all data, only those of ``shard`` are
        converted, so that n shards cover exactly these. Raises DataError if data is missing, breaks off
        or has no known columns, or if its prompts need a date that nobody gave.
        """
        index, count = self._config.shard or (0, 1)
        for number, row in enumerate(self._rows()):
            if number % count == index:
                yield from self.convert(row)

    def _rows(self) -> Iterator[Row]:
        # All are looked up before the first row is read: a typo is not found out hours later.
        sources = [source for argument in self._config.data for source in find_sources(argument)]
        remaining = self._config.limit
        for source in sources:
            for row in rows(source, self._shape.fits, self._shape.expected):
                if remaining == 0:
                    return
                remaining = None if remaining is None else remaining - 1
                yield row

    def convert(self, row: Row) -> Iterator[Sample | Reject]:
        """Yield what becomes of one row; raise DataError if its prompt needs a date that nobody gave."""
        try:
            if row.unreadable:
                raise RejectedRowError("unreadable", row.unreadable)
            generations = self._shape.generations(row.columns)
        except RejectedRowError as error:
            yield Reject(source=row.source, row=row.number, reason=error.reason, detail=error.detail)
            return
        origin = Origin(source=row.source, row=row.number, category=self._shape.category_of(row.columns))
        for number, generation in enumerate(generations):
            try:
                input_ids, loss_mask = self._checked(*self._tokens(generation))
            except RejectedRowError as error:
                detail = f"answer {number}: {error.detail}" if len(generations) > 1 else error.detail
                yield Reject(source=row.source, row=row.number, reason=error.reason, detail=detail)
            except DateMissingError as error:
                raise DataError(f"{row.source}: row {row.number} has no date. {error}") from error
            else:
                yield Sample(input_ids=input_ids, loss_mask=loss_mask, origin=origin)

    def _tokens(self, generation: Recorded | Conversation) -> tuple[Array, Array]:
        if isinstance(generation, Recorded):
            return generation.input_ids, generation.loss_mask
        if self._renderer is None:
            self._renderer = ChatRenderer(self._target.path)
        # A column that the prompt does not depend on may hold anything.
        effort = level(generation.effort) if self._renderer.takes_effort else None
        date = day(generation.date) if self._renderer.takes_date else None
        try:
            return self._renderer.render(
                generation.messages,
                effort=effort or self._config.reasoning_effort,
                date=date or self._config.date,
                truncated=generation.truncated,
            )
        except NotRenderedError as error:
            raise RejectedRowError("not_rendered", str(error)) from error

    def _checked(self, input_ids: Array, loss_mask: Array) -> tuple[Array, Array]:
        vocab_size = self._target.vocab_size
        if len(input_ids) < 2:
            raise RejectedRowError("empty", f"{len(input_ids)} tokens, expected at least 2")
        if len(loss_mask) != len(input_ids):
            raise RejectedRowError("mask_length", f"{len(loss_mask)} mask entries for {len(input_ids)} tokens")
        if not np.isin(loss_mask, (0, 1)).all():
            raise RejectedRowError("mask_value", "the mask has entries other than 0 and 1")
        if input_ids.min() < 0 or input_ids.max() >= vocab_size:
            worst = int(input_ids.max() if input_ids.max() >= vocab_size else input_ids.min())
            raise RejectedRowError("id_out_of_range", f"token id {worst}, the target's vocabulary has {vocab_size}")
        if len(input_ids) > self._max_length:
            if self._config.too_long == "reject":
                raise RejectedRowError("too_long", f"{len(input_ids)} tokens, the limit is {self._max_length}")
            input_ids, loss_mask = input_ids[: self._max_length], loss_mask[: self._max_length]
        if not loss_mask.any():
            raise RejectedRowError("nothing_supervised", f"none of {len(input_ids)} tokens is the target's own")
        return input_ids.astype(np.int32), loss_mask.astype(np.uint8)
