"""Rows of data sets -> prompts for the target to answer, or rejects with a reason.

A conversation's prompt is all before its last answer, rendered as it is served. Of
recorded token ids it is those before the first that the target sampled.

Shapes: T tokens of a prompt.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...config import ConfigError
from ...storage.schema import Array, Reject
from ..data.chat_template import ChatRenderer, NotRenderedError
from ..data.row_formats import Recorded, RejectedRowError, RowShape, day, level
from ..data.sources import DataError, Row, Source, find_sources, rows
from ..target import Target
from .answer_paths import is_own
from .config import RegenerateConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RegenerationPrompt:
    """What the target is asked to answer."""

    source: str
    row: int
    identifier: str
    """The row's own name, empty if it has none."""
    category: str
    messages: tuple[dict[str, str], ...]
    """``role`` and ``content``, in order; empty where the row holds token ids alone."""
    reasoning_effort: str | None
    date: str | None
    """YYYY-MM-DD, where the prompt names a day"""
    input_ids: Array
    """(T,) int32"""


class PromptReader:
    """Turns the rows of the data into prompts, in order."""

    def __init__(self, config: RegenerateConfig, target: Target, date: str) -> None:
        """``date`` is for rows that name none.

        Raises SpecxError if the target has no chat template or data is missing.
        """
        self._config = config
        self._target = target
        self._date = date
        self._max_length = min(config.max_length or target.max_length, target.max_length)
        self._shape = RowShape(messages=config.messages_column, category=config.category_column)
        self._renderer = ChatRenderer(target.path)
        if config.reasoning_effort is not None and not self._renderer.takes_effort:
            raise ConfigError(
                f"{target.path}: its chat template knows no reasoning effort. Leave --reasoning-effort out."
            )
        self._sources = _sources(config)

    def __iter__(self) -> Iterator[RegenerationPrompt | Reject]:
        """Yield a prompt or a reject a row; raise DataError if data breaks off or has no known columns."""
        remaining = self._config.limit
        for source in self._sources:
            for row in rows(source, self._shape.fits, self._shape.expected):
                if remaining == 0:
                    return
                remaining = None if remaining is None else remaining - 1
                try:
                    yield self._prompt(row)
                except RejectedRowError as error:
                    yield Reject(source=row.source, row=row.number, reason=error.reason, detail=error.detail)

    def text(self, sampled: Array) -> str:
        """Return sampled ids as text, special tokens and all."""
        return self._renderer.text(sampled)

    def _prompt(self, row: Row) -> RegenerationPrompt:
        if row.unreadable:
            raise RejectedRowError("unreadable", row.unreadable)
        columns = row.columns
        if columns.get("input_ids") is not None and columns.get("loss_mask") is not None:
            input_ids, messages, effort, date = self._recorded(columns)
        else:
            input_ids, messages, effort, date = self._rendered(columns)
        if len(input_ids) >= self._max_length:
            raise RejectedRowError("too_long", f"a prompt of {len(input_ids)} tokens, the limit is {self._max_length}")
        return RegenerationPrompt(
            source=row.source,
            row=row.number,
            identifier=str(next((columns[name] for name in ("id", "uuid", "primary_id") if columns.get(name)), "")),
            category=self._shape.category_of(columns),
            messages=tuple({"role": each["role"], "content": each["content"]} for each in messages),
            reasoning_effort=effort,
            date=date,
            input_ids=input_ids.astype(np.int32),
        )

    def _recorded(self, columns: Mapping[str, Any]) -> tuple[Array, list[Any], str | None, str | None]:
        (recorded,) = RowShape().generations({**columns, "status": None})
        assert isinstance(recorded, Recorded)
        ids, sampled = recorded.input_ids, np.flatnonzero(recorded.loss_mask)
        if len(recorded.loss_mask) != len(ids):
            raise RejectedRowError("mask_length", f"{len(recorded.loss_mask)} mask entries for {len(ids)} tokens")
        prompt = ids[: sampled[0]] if len(sampled) else ids
        if not len(prompt):
            raise RejectedRowError("empty", "no tokens before the first that was sampled")
        vocab_size = self._target.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise RejectedRowError("id_out_of_range", f"token ids outside the target's vocabulary of {vocab_size}")
        messages = columns.get("messages")
        kept = _without_answer(messages) if isinstance(messages, list) and all(map(_is_plain, messages)) else []
        return prompt, kept, level(columns.get("reasoning_effort")), day(columns.get("date"))

    def _rendered(self, columns: Mapping[str, Any]) -> tuple[Array, list[Any], str | None, str | None]:
        (conversation,) = self._shape.conversations(columns)
        messages = _without_answer(list(conversation.messages))
        effort = date = None
        if self._renderer.takes_effort:
            effort = level(conversation.effort) or self._config.reasoning_effort
        if self._renderer.takes_date:
            date = day(conversation.date) or self._date
        try:
            return self._renderer.prompt(messages, effort=effort, date=date), messages, effort, date
        except NotRenderedError as error:
            raise RejectedRowError("not_rendered", str(error)) from error


def _sources(config: RegenerateConfig) -> list[Source]:
    out = Path(config.out)
    # By name: patterns may overlap, and a row has one answer. A directory of prompts may be where the answers go.
    found = {source.name: source for argument in config.data for source in find_sources(argument)}
    sources = [source for name, source in found.items() if not is_own(Path(name), out)]
    if not sources:
        raise DataError(f"{', '.join(config.data)}: nothing but this run's own output. Give --out another place.")
    return sources


def _without_answer(messages: list[Any]) -> list[Any]:
    has_answer = bool(messages) and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"
    return messages[:-1] if has_answer else messages


def _is_plain(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
