"""What every judge is asked to do, and what it is to be able to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..chat_template import ChatTemplate
from ..generations import Pass
from ..prompts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingTask:
    """Decode some prompts with a draft, and without."""

    target: Path
    draft: Path
    prompts: list[Prompt]
    template: ChatTemplate | None
    """Renders later turns; None where no prompt has any."""
    num_speculative_tokens: int
    """Tokens drafted per verification."""
    max_new_tokens: int
    """Tokens generated per turn."""
    max_length: int
    """Tokens of a prompt and its answer that the target takes."""
    stop_ids: frozenset[int]
    """Token ids that end a generation."""
    temperature: float
    """0 is greedy."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Type to run both models in; auto is the target's."""


class DecodingEngine(Protocol):
    """A loaded engine, with the draft or without."""

    def decode(self, batch_size: int) -> Pass:
        """Decode all prompts of its task, that many conversations at a time."""


class Conversation:
    """One prompt while it is played, turn after turn."""

    def __init__(self, task: DecodingTask, number: int) -> None:
        """``number`` is that of the prompt in ``task``."""
        self._task = task
        self.number = number
        self.turn = 0
        self.ids = task.prompts[number].ids
        """What the target is asked to continue now."""
        self._messages = task.prompts[number].messages

    @property
    def new_tokens(self) -> int:
        """Tokens that may be generated in this turn."""
        return min(self._task.max_new_tokens, self._task.max_length - len(self.ids))

    def advance(self, output_ids: Sequence[int]) -> bool:
        """Take the target's answer in; return whether there is another turn, for which the target has room."""
        prompt, template = self._task.prompts[self.number], self._task.template
        if self.turn == len(prompt.later_turns):
            return False
        assert template is not None
        self._messages += (
            {"role": "assistant", "content": template.answer(output_ids)},
            {"role": "user", "content": prompt.later_turns[self.turn]},
        )
        self.turn += 1
        self.ids = template.prompt(self._messages, f"prompt {prompt.name}, turn {self.turn + 1}")
        return self.new_tokens > 0
