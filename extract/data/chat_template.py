"""Conversations -> token ids and loss mask, through the target's own chat template.

The prompt is what was served: the row's effort and date and never today's, earlier answers without
their reasoning. The mask is 1 on what the target sampled: where the template marks it with
``{% generation %}`` its mask is taken, otherwise all behind the generation prompt of the last answer.
No token stands behind the last one that was sampled.

Shapes: T tokens of a conversation.
"""

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ... import SpecxError
from ...storage.schema import Array

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CUT = "\ue000specx\ue001"
"""Marks the end of a truncated text; made of characters for private use."""


class NotRenderedError(Exception):
    """One conversation cannot be rendered; its row is rejected with this message."""


class DateMissingError(SpecxError):
    """The chat template asks for the date and nobody gave one."""


class ChatRenderer:
    """Renders with one tokenizer."""

    def __init__(self, target_directory: Path) -> None:
        """Load the tokenizer; raise SpecxError if there is none or it has no chat template."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(target_directory, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SpecxError(
                f"{target_directory}: no usable tokenizer ({reason}). Conversations need one; rows of token ids do not."
            ) from error
        if not tokenizer.chat_template:
            raise SpecxError(f"{target_directory}: the tokenizer has no chat template. Give rows of token ids.")
        self._directory = target_directory
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        template = str(tokenizer.get_chat_template())
        self._marks_generation = bool(_GENERATION.search(template))
        self.takes_effort = "reasoning_effort" in template
        """Whether the prompt depends on ``effort``."""
        self.takes_date = "strftime_now" in template or "current_date" in template
        """Whether the prompt depends on ``date``."""
        self._end_ids = _end_ids(target_directory, tokenizer)

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], *, effort: str | None = None, date: str | None = None
    ) -> Array:
        """Return ids (T,) int32 of what is served to have the next answer generated.

        ``effort`` is the template's ``reasoning_effort``, ``date`` is YYYY-MM-DD; None leaves the template's own.
        Raises NotRenderedError if the conversation cannot be rendered or ends with an answer, and
        DateMissingError if the template asks for the date and there is none.
        """
        turns = _turns(messages)
        if turns[-1]["role"] == "assistant":
            raise NotRenderedError("the last message is the assistant's")
        return self._prompt(turns, self._variables(effort, date))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        effort: str | None = None,
        date: str | None = None,
        truncated: bool = False,
    ) -> tuple[Array, Array]:
        """Return ids (T,) int32 and mask (T,) uint8 of a conversation whose last message is the answer.

        Only that answer has mask 1. A ``truncated`` one ends with its own last token, no end is invented.
        The rest is as for ``prompt``.
        """
        turns = _turns(messages, truncated=truncated)
        if turns[-1]["role"] != "assistant":
            raise NotRenderedError("the last message is not the assistant's")
        if len(turns) == 1:
            raise NotRenderedError("there is no message before the answer")
        variables = self._variables(effort, date)
        prompt = self._prompt(turns[:-1], variables)
        if truncated:
            ids = self._truncated(turns, variables)
        elif self._marks_generation:
            return self._marked(turns, prompt, variables)
        else:
            ids = self._ids(self._apply(turns, variables, tokenize=False))
        if not _starts_with(ids, prompt):
            raise NotRenderedError("the rendered prompt is not a prefix of the rendered conversation")
        ends = np.flatnonzero(np.isin(ids[len(prompt) :], self._end_ids))
        if len(ends) and not truncated:
            # Some templates close the turn with more than the target sampled, such as a line feed.
            ids = ids[: len(prompt) + ends[-1] + 1]
        return ids, (np.arange(len(ids)) >= len(prompt)).astype(np.uint8)

    def text(self, ids: Array) -> str:
        """Return ids (T,) as text, special tokens and all."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _marked(self, turns: list[dict[str, str]], prompt: Array, variables: Mapping[str, Any]) -> tuple[Array, Array]:
        rendered = self._apply(turns, variables, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = np.asarray(rendered["input_ids"], np.int32), np.asarray(rendered["assistant_masks"], np.uint8)
        if _starts_with(ids, prompt):
            mask[: len(prompt)] = 0
        elif sum(turn["role"] == "assistant" for turn in turns) > 1:
            raise NotRenderedError("the rendered prompt is not a prefix of the rendered conversation")
        stop = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else len(ids)
        return ids[:stop], mask[:stop]

    def _truncated(self, turns: list[dict[str, str]], variables: Mapping[str, Any]) -> Array:
        """Render up to the last character of the answer, or of its reasoning where it came no further."""
        answer = dict(turns[-1])
        cut = [
            key for key in (("content",) if answer["content"] else ("thinking", "reasoning_content")) if key in answer
        ]
        if not cut:
            raise NotRenderedError("the truncated answer has no text")
        answer |= {key: answer[key] + _CUT for key in cut}
        text, mark, _ = self._apply([*turns[:-1], answer], variables, tokenize=False).partition(_CUT)
        if not mark:
            raise NotRenderedError("the chat template leaves the truncated text out")
        return self._ids(text)

    def _variables(self, effort: str | None, date: str | None) -> dict[str, Any]:
        variables: dict[str, Any] = {"strftime_now": self._clock(date)}
        if effort is not None:
            variables["reasoning_effort"] = effort
        if date is not None:
            variables["current_date"] = date
        return variables

    def _clock(self, date: str | None) -> Callable[[str], str]:
        def strftime_now(form: str) -> str:
            if date is None:
                raise DateMissingError(
                    f"{self._directory}: the chat template asks for the date and there is none. "
                    "Give --date YYYY-MM-DD, the day the answers were generated, or rows with a column date."
                )
            return datetime.date.fromisoformat(date).strftime(form)

        return strftime_now

    def _prompt(self, turns: list[dict[str, str]], variables: Mapping[str, Any]) -> Array:
        text = self._apply(turns, variables, tokenize=False, add_generation_prompt=True)
        for turn in turns:
            # A template may change older answers, and skip a message it has no place for without a word.
            if turn["role"] != "assistant" and turn["content"].strip() not in text:
                raise NotRenderedError(f"the chat template leaves out a message of role {turn['role']!r}")
        return self._ids(text)

    def _ids(self, text: str) -> Array:
        try:
            return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        except (TypeError, ValueError) as error:
            raise NotRenderedError(f"the tokenizer refused it: {error}") from error

    def _apply(self, turns: list[dict[str, str]], variables: Mapping[str, Any], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(turns, **variables, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise NotRenderedError(f"the chat template refused it: {error}") from error


def _starts_with(ids: Array, prompt: Array) -> bool:
    return np.array_equal(ids[: len(prompt)], prompt)


def _end_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found: list[Any] = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        try:
            ids = json.loads(path.read_text())["eos_token_id"]
        except (FileNotFoundError, KeyError):
            continue
        except (ValueError, TypeError) as error:
            raise SpecxError(f"{path}: not a JSON object ({error}). Download the model again.") from error
        found += ids if isinstance(ids, list) else [ids]
    return [id_ for id_ in found if isinstance(id_, int)]


def _turns(messages: Any, *, truncated: bool = False) -> list[dict[str, str]]:
    if not isinstance(messages, list | tuple):
        raise NotRenderedError(f"a conversation is a list of messages, found {type(messages).__name__}")
    if not messages:
        raise NotRenderedError("the conversation has no messages")
    *earlier, last = messages
    # Reasoning is not sent back to the target, whether or not the template would show it.
    return [*(_turn(message, reasoning=False) for message in earlier), _turn(last, may_end_early=truncated)]


def _turn(message: Any, *, reasoning: bool = True, may_end_early: bool = False) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise NotRenderedError(f"a message needs role and content, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    thoughts = message.get("thinking") or message.get("reasoning_content")
    if content is None and thoughts and may_end_early:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise NotRenderedError(f"a message needs role and content as text, found keys {sorted(map(str, message))}")
    if message.get("tool_calls"):
        raise NotRenderedError("a message has tool_calls, which are not read")
    turn = {"role": role, "content": content}
    if thoughts and not isinstance(thoughts, str):
        raise NotRenderedError(f"a message's reasoning is text, found {type(thoughts).__name__}")
    if thoughts and reasoning:
        # Templates disagree on the name: gpt-oss reads the first, most others the second.
        turn |= {"thinking": thoughts, "reasoning_content": thoughts}
    return turn
