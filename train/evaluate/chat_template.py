"""The target's chat template: a conversation as ids, and an answer's ids as what is said of it in the next turn.

Of what a reasoning target generates only the answer goes back to it, as it is served.
"""

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import TrainError

Message = dict[str, str]
"""``role`` and ``content``."""

_HARMONY_FINAL = re.compile(
    r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?=<\|(?:return|end|call|start)\|>|\Z)", re.DOTALL
)
_THINKING = re.compile(r"\A.*</think>\s*", re.DOTALL)


class ChatTemplate:
    """Renders with one tokenizer."""

    def __init__(self, target: Path, *, effort: str | None = None, date: str | None = None) -> None:
        """``effort`` and ``date`` (YYYY-MM-DD) are those of every prompt; None leaves the template's own.

        Raises TrainError if there is no tokenizer or it has no chat template.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TrainError(
                f"{target}: no usable tokenizer ({' '.join(str(error).split())[:160]}). Prompts as text need one; rows "
                "of token ids do not."
            ) from error
        if not tokenizer.chat_template:
            raise TrainError(f"{target}: the tokenizer has no chat template. Give rows of token ids.")
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self._variables: dict[str, Any] = {}
        if effort is not None:
            self._variables["reasoning_effort"] = effort
        if date is not None:
            day = datetime.date.fromisoformat(date)
            self._variables |= {"current_date": date, "strftime_now": day.strftime}

    def prompt(self, messages: Sequence[Message], where: str) -> list[int]:
        """Return the ids that have the next answer generated; ``where`` names the row in a TrainError."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **self._variables
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TrainError(f"{where}: the chat template refused it: {error}. Leave it out.") from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answer(self, output_ids: Sequence[int]) -> str:
        """Return the text of an answer without its reasoning; empty where it was cut off before the answer began."""
        text = str(self._tokenizer.decode(list(output_ids), skip_special_tokens=False))
        if "<|channel|>" in text:
            found = _HARMONY_FINAL.findall(text)
            return str(found[-1]).strip() if found else ""
        plain = str(self._tokenizer.decode(list(output_ids), skip_special_tokens=True))
        return _THINKING.sub("", plain).strip()
