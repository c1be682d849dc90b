"""Speculative decoding in transformers, our own loop: slow, simple, independent of any engine.

Shapes: T tokens of one forward, L boundaries, H hidden size.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ...families.load import load_draft
from ..generations import Generation, Pass, tally_of, whole_pass
from .base import Conversation, DecodingEngine, DecodingTask


class CachedTarget:
    """The target with its KV cache, for one sequence."""

    def __init__(
        self,
        model: PreTrainedModel,
        boundaries: tuple[int, ...],
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Without ``boundaries`` the features are the last hidden states; ``temperature`` 0 is greedy."""
        self._model = model
        self._boundaries = boundaries
        self._temperature = temperature
        self._generator = generator
        # Not made from the config: sliding-window layers would forget what a rejected draft overwrote.
        self._cache = DynamicCache()

    @torch.inference_mode()
    def forward(self, ids: list[int]) -> tuple[list[int], torch.Tensor]:
        """Append T tokens; return the target's next token behind each, and their features.

        Those are auxiliary hidden states (T, L, H), or last hidden states (T, H).
        """
        output = self._model(
            input_ids=torch.tensor([ids]),
            past_key_values=self._cache,
            use_cache=True,
            output_hidden_states=True,
        )
        states = output.hidden_states
        # transformers applies the final norm to the last one.
        features = torch.stack([states[b][0] for b in self._boundaries], dim=1) if self._boundaries else states[-1][0]
        return self._chosen(output.logits[0]).tolist(), features

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the best token (T,) of logits (T, V), or one drawn at the temperature."""
        if not self._temperature:
            return logits.argmax(-1)
        probabilities = (logits.float() / self._temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self._generator).squeeze(-1)

    def forget_last(self, count: int) -> None:
        """Drop the last ``count`` tokens."""
        if count:
            self._cache.crop(-count)


class ChainEngine:
    """Our own loop over a loaded target and draft, one conversation at a time."""

    def __init__(self, task: DecodingTask, *, is_drafted: bool) -> None:
        self._task = task
        self._num_drafted = task.num_speculative_tokens if is_drafted else 0
        self._model = AutoModelForCausalLM.from_pretrained(task.target, dtype=task.dtype, local_files_only=True)
        self._model.requires_grad_(False)
        self._exported = load_draft(task.draft, self._model.dtype)
        self._generator = torch.Generator()

    def decode(self, batch_size: int) -> Pass:
        """Decode all prompts; ``batch_size`` is 1. What is drawn is the same each time."""
        assert batch_size == 1
        self._generator.manual_seed(0)
        started = time.monotonic()
        generations = []
        for number in range(len(self._task.prompts)):
            conversation = Conversation(self._task, number)
            is_going_on = conversation.new_tokens > 0
            while is_going_on:
                generations.append(self._generate(conversation))
                is_going_on = conversation.advance(generations[-1].output_ids)
        return whole_pass(generations, time.monotonic() - started)

    def _generate(self, conversation: Conversation) -> Generation:
        started = time.monotonic()
        model, exported, ids = self._model, self._exported, conversation.ids
        target = CachedTarget(model, exported.draft.spec.boundaries, self._task.temperature, self._generator)
        decoder = exported.family.proposer(
            exported.draft,
            exported.vocabulary,
            model.get_input_embeddings().get_parameter("weight"),
            model.get_parameter("lm_head.weight"),
        )
        following, features = target.forward(ids)
        output = [following[-1]]
        if self._num_drafted:
            decoder.extend([*ids[1:], output[-1]], features)
        accepted: list[int] = []
        stop_ids = self._task.stop_ids
        longest = min(conversation.new_tokens, self._task.max_length - self._num_drafted - len(ids))
        while len(output) < longest and output[-1] not in stop_ids:
            proposed = decoder.propose(self._num_drafted) if self._num_drafted else []
            following, features = target.forward([output[-1], *proposed])
            # A draft that proposes its best token with certainty is accepted with the target's probability p of it,
            # and else gives way to a token of p without it (Leviathan et al. 2023, algorithm 1): that is, where the
            # target draws the same, and to what it draws.
            count = 0
            while count < len(proposed) and proposed[count] == following[count]:
                count += 1
            target.forget_last(len(proposed) - count)
            emitted = following[: count + 1]
            if self._num_drafted:
                decoder.extend(emitted, features[: count + 1])
                accepted.append(count)
            stop = next((i + 1 for i, token in enumerate(emitted) if token in stop_ids), len(emitted))
            output += emitted[:stop]
        return Generation(
            prompt=conversation.number,
            turn=conversation.turn,
            prompt_length=len(ids),
            output_ids=output[: conversation.new_tokens],
            accepted=accepted if self._num_drafted else None,
            tally=tally_of(accepted) if self._num_drafted else None,
            seconds=time.monotonic() - started,
        )


@contextmanager
def open_engine(task: DecodingTask, *, is_drafted: bool) -> Iterator[DecodingEngine]:
    """Load the target, and the draft."""
    yield ChainEngine(task, is_drafted=is_drafted)
