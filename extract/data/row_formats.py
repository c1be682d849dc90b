"""Columns of a row -> what the target generated: recorded token ids, or conversations to render.

Shapes are told apart by their columns, row by row:

- ``input_ids`` and ``loss_mask``: exactly what was sampled; they win over text in the same row;
- ``conversations`` or ``messages``: a list of ``role`` and ``content``, the last answer's reasoning as
  ``thinking`` or ``reasoning_content``; or of ``from`` and ``value``, where an answer may be split into
  ``assistant_analysis`` and ``assistant_final`` and the effort be an entry of its own.

Beside them ``status``, ``finish_reason`` or ``truncated``, ``reasoning_effort``, ``date`` and
``category`` are read; other columns are not.

Shapes: T tokens.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...storage.schema import Array
from .sources import one_line

_CONVERSATIONS = ("conversations", "messages")
_ROLES = {"human": "user", "gpt": "assistant", "assistant_final": "assistant"}
"""Names that older data has for a role."""
_ANALYSIS, _EFFORT = "assistant_analysis", "assistant_reasoning_effort"

Reason = Literal[
    "bad_date",
    "bad_effort",
    "empty",
    "id_out_of_range",
    "mask_length",
    "mask_value",
    "not_integers",
    "not_rendered",
    "not_successful",
    "nothing_supervised",
    "too_long",
    "unreadable",
]
"""Why a row was left out; ``docs/data.md`` explains each."""


class RejectedRowError(Exception):
    """The row, or one answer of it, gives no sample."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = one_line(detail)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """Token ids as they were sampled, not yet checked."""

    input_ids: Array
    """(T,) of any integer type"""
    loss_mask: Array
    """of any length and any integer type or bool"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages up to and with one answer, as ``ChatRenderer.render`` takes them."""

    messages: Sequence[Any]
    effort: Any
    """As the row has it; see ``level``."""
    date: Any
    """As the row has it; see ``day``."""
    truncated: bool
    """The answer was cut off, so it has no end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """Which columns are read, and how; a name that is None was not chosen."""

    messages: str | None = None
    input_ids: str | None = None
    loss_mask: str | None = None
    category: str | None = None
    turns: Literal["last", "all"] = "last"

    @property
    def expected(self) -> str:
        """The columns that are read, in words."""
        names = (f"{self.input_ids or 'input_ids'} and {self.loss_mask or 'loss_mask'}", *self._conversations)
        chosen = f", and the chosen {', '.join(self._chosen)}" if self._chosen else ""
        return ", or ".join(names) + chosen

    @property
    def _conversations(self) -> tuple[str, ...]:
        return (self.messages,) if self.messages else _CONVERSATIONS

    @property
    def _chosen(self) -> tuple[str, ...]:
        return tuple(name for name in (self.messages, self.input_ids, self.loss_mask, self.category) if name)

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Say whether a row has all columns that were chosen, and those of one shape."""
        has_ids = {self.input_ids or "input_ids", self.loss_mask or "loss_mask"} <= set(columns)
        has_text = any(name in columns for name in self._conversations)
        return (has_ids or has_text) and set(self._chosen) <= set(columns)

    def category_of(self, columns: Mapping[str, Any]) -> str:
        """Return the row's category; one that is no word is none."""
        value = columns.get(self.category or "category")
        is_word = isinstance(value, str) or (isinstance(value, int) and value.bit_length() < 64)
        return one_line(str(value)) if is_word else ""

    def generations(self, columns: Mapping[str, Any]) -> list[Recorded | Conversation]:
        """Return what the target generated, one item an answer; raise RejectedRowError if there is nothing."""
        status = columns.get("status")
        if status not in (None, "success"):
            raise RejectedRowError("not_successful", f"status is {_named(status)}")
        names = self.input_ids or "input_ids", self.loss_mask or "loss_mask"
        if all(columns.get(name) is not None for name in names):
            input_ids, loss_mask = (_integers(name, columns[name]) for name in names)
            return [Recorded(input_ids=input_ids, loss_mask=loss_mask)]
        return list(self.conversations(columns))

    def conversations(self, columns: Mapping[str, Any]) -> Iterator[Conversation]:
        """Yield the row's conversation as ``turns`` wants it; raise RejectedRowError if there is none."""
        messages = next((columns[name] for name in self._conversations if columns.get(name)), None)
        if messages is None:
            raise RejectedRowError("empty", f"no {self.expected} in the row")
        if not isinstance(messages, list | tuple):
            found = type(messages).__name__
            raise RejectedRowError("not_rendered", f"a conversation is a list of messages, found {found}")
        efforts = [_text(message) for message in messages if _speaker(message) == _EFFORT]
        if any(effort != efforts[0] for effort in efforts):
            raise RejectedRowError("bad_effort", "the conversation has several reasoning efforts")
        effort = efforts[0] if efforts else columns.get("reasoning_effort")
        turns = list(_joined([message for message in messages if _speaker(message) != _EFFORT]))
        ends = [len(turns)]
        if self.turns == "all":
            ends = [index + 1 for index, turn in enumerate(turns) if _speaker(turn) == "assistant"]
            if not ends:
                raise RejectedRowError("not_rendered", "no message is the assistant's")
        was_cut = columns.get("finish_reason") == "length" or columns.get("truncated") is True
        for end in ends:
            yield Conversation(
                messages=turns[:end],
                effort=effort,
                date=columns.get("date"),
                truncated=was_cut and end == len(turns),
            )


def level(value: Any) -> str | None:
    """Return a row's reasoning effort in lower case, None if it has none; raise RejectedRowError if it is no word."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip().isalpha():
        raise RejectedRowError("bad_effort", f"the reasoning effort is {_named(value)}, expected a word")
    return value.strip().lower()


def day(value: Any) -> str | None:
    """Return a row's date as YYYY-MM-DD, None if it has none; raise RejectedRowError if it is no date."""
    if value is None or isinstance(value, datetime.date):  # a datetime is one
        return None if value is None else value.strftime("%Y-%m-%d")
    try:
        return datetime.datetime.fromisoformat(value).strftime("%Y-%m-%d")
    except (TypeError, ValueError) as error:
        raise RejectedRowError("bad_date", f"date is {_named(value)}, expected YYYY-MM-DD") from error


def _joined(messages: Sequence[Any]) -> Iterator[Any]:
    """Yield messages with ``role`` and ``content``; an analysis becomes its answer's ``thinking``."""
    analysis: Any = None
    for message in messages:
        speaker = _speaker(message)
        role = _ROLES.get(speaker, speaker)
        if analysis is not None and role != "assistant":
            raise RejectedRowError("not_rendered", "an analysis has no final answer behind it")
        if speaker == _ANALYSIS:
            analysis = _text(message)
        elif analysis is not None:
            yield {**message, "role": role, "content": _text(message), "thinking": analysis}
            analysis = None
        else:
            yield {**message, "role": role, "content": _text(message)} if role else message
    if analysis is not None:
        # A truncated answer may have come no further; ``render`` refuses it in any other.
        yield {"role": "assistant", "content": None, "thinking": analysis}


def _speaker(message: Any) -> str:
    if not isinstance(message, Mapping):
        return ""
    name = message.get("role") or message.get("from")
    return name if isinstance(name, str) else ""


def _text(message: Mapping[str, Any]) -> Any:
    return message["content"] if message.get("content") is not None else message.get("value")


def _integers(name: str, values: Any) -> Array:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # lists of different lengths, or nested too deeply
        array = np.asarray(None)
    if not array.size and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise RejectedRowError("not_integers", f"{name} is not a list of integers")
    return array


def _named(value: Any) -> str:
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"
