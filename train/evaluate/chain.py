"""Speculative decoding in transformers, our own loop: slow, simple, independent of any engine.

Shapes: T tokens of one forward, L boundaries, H hidden size.
"""

import logging
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from .decoder import DraftDecoder, ExportedDraft, load_draft
from .prompts import Prompt
from .result import Decoding, Generation

_log = logging.getLogger(__name__)


class CachedTarget:
    """The target with its KV cache, for one sequence."""

    def __init__(self, model: PreTrainedModel, boundaries: tuple[int, ...]) -> None:
        self._model = model
        self._boundaries = boundaries
        # Not made from the config: sliding-window layers would forget what a rejected draft overwrote.
        self._cache = DynamicCache()

    @torch.inference_mode()
    def forward(self, ids: list[int]) -> tuple[list[int], torch.Tensor]:
        """Append T tokens; return the target's next token behind each, and their states (T, L, H)."""
        output = self._model(
            input_ids=torch.tensor([ids]),
            past_key_values=self._cache,
            use_cache=True,
            output_hidden_states=True,
        )
        aux_hidden = torch.stack([output.hidden_states[b][0] for b in self._boundaries], dim=1)
        return output.logits[0].argmax(-1).tolist(), aux_hidden

    def forget_last(self, count: int) -> None:
        """Drop the last ``count`` tokens."""
        if count:
            self._cache.crop(-count)


def decode(
    *,
    target: Path,
    draft: Path,
    prompts: list[Prompt],
    num_speculative_tokens: int,
    max_new_tokens: int,
    stop_ids: set[int],
    dtype: torch.dtype,
) -> tuple[Decoding, Decoding]:
    """Decode greedily with the draft, then without; return both passes."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, local_files_only=True)
    model.requires_grad_(False)
    exported = load_draft(draft, dtype)
    passes = []
    for count in (num_speculative_tokens, 0):
        started = time.monotonic()
        generations = [
            generate(
                model,
                exported,
                prompt,
                num_speculative_tokens=count,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
            )
            for prompt in prompts
        ]
        passes.append(Decoding(generations=generations, seconds=time.monotonic() - started))
        _log.info("%d prompts decoded with %d drafted tokens a step", len(prompts), count)
    return passes[0], passes[1]


def generate(
    model: PreTrainedModel,
    exported: ExportedDraft,
    prompt: Prompt,
    *,
    num_speculative_tokens: int,
    max_new_tokens: int,
    stop_ids: set[int],
) -> Generation:
    """Decode one prompt greedily; 0 speculative tokens is the target alone."""
    target = CachedTarget(model, exported.draft.spec.boundaries)
    decoder = DraftDecoder(exported, model.get_input_embeddings().get_parameter("weight"))
    following, aux_hidden = target.forward(prompt.ids)
    output = [following[-1]]
    if num_speculative_tokens:
        decoder.extend([*prompt.ids[1:], output[-1]], aux_hidden)
    accepted: list[int] = []
    room = model.config.max_position_embeddings - num_speculative_tokens
    while len(output) < max_new_tokens and output[-1] not in stop_ids and len(prompt.ids) + len(output) < room:
        proposed = decoder.propose(num_speculative_tokens) if num_speculative_tokens else []
        following, aux_hidden = target.forward([output[-1], *proposed])
        count = 0
        while count < len(proposed) and proposed[count] == following[count]:
            count += 1
        target.forget_last(len(proposed) - count)
        emitted = following[: count + 1]
        if num_speculative_tokens:
            decoder.extend(emitted, aux_hidden[: count + 1])
            accepted.append(count)
        stop = next((i + 1 for i, token in enumerate(emitted) if token in stop_ids), len(emitted))
        output += emitted[:stop]
    return Generation(
        prompt_length=len(prompt.ids),
        category=prompt.category,
        output_ids=output[:max_new_tokens],
        accepted=accepted,
    )
