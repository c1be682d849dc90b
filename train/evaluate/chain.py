"""Speculative decoding in transformers, our own loop: slow, simple, independent of any engine.

Shapes: T tokens of one forward, L boundaries, H hidden size.
"""

import logging
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ..exported import ExportedDraft, load_draft
from .decoder import DraftDecoder
from .prompts import Prompt
from .result import Decoding, Generation
from .task import DecodingTask

_log = logging.getLogger(__name__)


class CachedTarget:
    """The target with its KV cache, for one sequence."""

    def __init__(self, model: PreTrainedModel, boundaries: tuple[int, ...]) -> None:
        """Without ``boundaries`` the features are the last hidden states."""
        self._model = model
        self._boundaries = boundaries
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
        return output.logits[0].argmax(-1).tolist(), features

    def forget_last(self, count: int) -> None:
        """Drop the last ``count`` tokens."""
        if count:
            self._cache.crop(-count)


def decode(task: DecodingTask) -> tuple[Decoding, Decoding]:
    """Decode greedily with the draft, then without; return both passes."""
    model = AutoModelForCausalLM.from_pretrained(task.target, dtype=task.dtype, local_files_only=True)
    model.requires_grad_(False)
    exported = load_draft(task.draft, model.dtype)
    passes = []
    for count in (task.num_speculative_tokens, 0):
        started = time.monotonic()
        generations = [generate(model, exported, prompt, task, count) for prompt in task.prompts]
        passes.append(Decoding(generations=generations, seconds=time.monotonic() - started))
        _log.info("%d prompts decoded with %d drafted tokens a step", len(task.prompts), count)
    return passes[0], passes[1]


def generate(
    model: PreTrainedModel, exported: ExportedDraft, prompt: Prompt, task: DecodingTask, num_drafted: int
) -> Generation:
    """Decode one prompt greedily with ``num_drafted`` tokens a step; 0 is the target alone."""
    target = CachedTarget(model, exported.draft.spec.boundaries)
    decoder = DraftDecoder(
        exported,
        model.get_input_embeddings().get_parameter("weight"),
        model.get_parameter("lm_head.weight"),
    )
    following, features = target.forward(prompt.ids)
    output = [following[-1]]
    if num_drafted:
        decoder.extend([*prompt.ids[1:], output[-1]], features)
    accepted: list[int] = []
    longest = min(task.max_new_tokens, model.config.max_position_embeddings - num_drafted - len(prompt.ids))
    while len(output) < longest and output[-1] not in task.stop_ids:
        proposed = decoder.propose(num_drafted) if num_drafted else []
        following, features = target.forward([output[-1], *proposed])
        count = 0
        while count < len(proposed) and proposed[count] == following[count]:
            count += 1
        target.forget_last(len(proposed) - count)
        emitted = following[: count + 1]
        if num_drafted:
            decoder.extend(emitted, features[: count + 1])
            accepted.append(count)
        stop = next((i + 1 for i, token in enumerate(emitted) if token in task.stop_ids), len(emitted))
        output += emitted[:stop]
    return Generation(
        prompt_length=len(prompt.ids),
        category=prompt.category,
        output_ids=output[: task.max_new_tokens],
        accepted=accepted,
    )
