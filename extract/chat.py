"""Conversations -> token ids and loss mask, through the target's own chat template.

The loss mask is 1 on what the target sampled: where the template marks it with
``{% generation %}`` its mask is taken, otherwise all behind the generation prompt
of the last answer.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import SpecxError
from ..storage.schema import Array

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class NotRenderedError(Exception):
    """One conversation cannot be rendered; its row is rejected with this message."""


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
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self._marks_generation = bool(_GENERATION.search(str(tokenizer.chat_template)))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
        """Return ids (T,) int32 and mask (T,) uint8 of a conversation whose last message is the answer.

        Raises NotRenderedError.
        """
        if not isinstance(messages, Sequence):
            raise NotRenderedError(f"a conversation is a list of messages, found {type(messages).__name__}")
        turns = [_turn(message) for message in messages]
        if not turns or turns[-1]["role"] != "assistant":
            raise NotRenderedError("the last message is not the assistant's")
        if self._marks_generation:
            rendered = self._apply(turns, return_dict=True, return_assistant_tokens_mask=True)
            return np.asarray(rendered["input_ids"], np.int32), np.asarray(rendered["assistant_masks"], np.uint8)
        ids = np.asarray(self._apply(turns, return_dict=False), np.int32)
        prompt = np.asarray(self._apply(turns[:-1], return_dict=False, add_generation_prompt=True), np.int32)
        if not np.array_equal(ids[: len(prompt)], prompt):
            raise NotRenderedError("the rendered prompt is not a prefix of the rendered conversation")
        return ids, (np.arange(len(ids)) >= len(prompt)).astype(np.uint8)

    def _apply(self, turns: list[dict[str, str]], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=True, **options)
        except (jinja2.TemplateError, TypeError) as error:
            raise NotRenderedError(f"the chat template refused it: {error}") from error


def _turn(message: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise NotRenderedError(f"a message needs role and content, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise NotRenderedError(f"a message needs role and content as text, found keys {sorted(message)}")
    turn = {"role": role, "content": content}
    reasoning = message.get("thinking") or message.get("reasoning_content")
    if reasoning:
        # Templates disagree on the name: gpt-oss reads the first, most others the second.
        turn |= {"thinking": reasoning, "reasoning_content": reasoning}
    return turn
