"""An exported draft, run as engines run it: one token at a time with a KV cache.

Shapes: T new tokens, L boundaries, H hidden size, n heads, D head dimension,
Vd draft vocabulary. One sequence at a time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from ..contract import CONFIG_FILE, WEIGHTS_FILE
from ..draft import Draft
from ..errors import TrainError
from ..spec import DraftSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedDraft:
    """A draft read back from its checkpoint."""

    draft: Draft
    vocabulary: torch.Tensor
    """(Vd,) int64, target ids"""


def load_draft(directory: Path, dtype: torch.dtype) -> ExportedDraft:
    """Read an exported draft; raise TrainError if the directory holds none."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        spec = DraftSpec(
            # The chain never looks at these two; the target is at hand.
            target_architecture="",
            num_target_layers=0,
            boundaries=tuple(config["eagle_aux_hidden_state_layer_ids"]),
            **{key: config[key] for key in DraftSpec.model_fields if key in config},
        )
        tensors = load_file(directory / WEIGHTS_FILE)
        d2t = tensors.pop("d2t", torch.zeros(spec.draft_vocab_size, dtype=torch.int64))
        tensors.pop("t2d", None)
        draft = Draft(spec)
        draft.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TrainError(f"{directory}: not an exported draft: {reason}. Make one with `specx export`.") from error
    return ExportedDraft(draft=draft.to(dtype).eval(), vocabulary=d2t + torch.arange(len(d2t)))


class DraftDecoder:
    """Drafts for one sequence; ``extend`` follows the target, ``propose`` runs ahead of it."""

    def __init__(self, exported: ExportedDraft, embed_tokens: torch.Tensor) -> None:
        """``embed_tokens`` (V, H) are the target's."""
        self._draft = exported.draft
        self._vocabulary = exported.vocabulary
        self._embed_tokens = embed_tokens
        self._state: _State | None = None

    @torch.inference_mode()
    def extend(self, next_ids: list[int], aux_hidden: torch.Tensor) -> None:
        """Take in T verified tokens: each one's auxiliary hidden states (T, L, H) and the id behind it."""
        self._state = self._step(next_ids, self._draft.fuse(aux_hidden[None]), self._state)

    @torch.inference_mode()
    def propose(self, count: int) -> list[int]:
        """Return the ids of ``count`` drafted tokens, greedily; the cache is left as it was."""
        proposed: list[int] = []
        for normed in self.ahead(proposed, count):
            proposed.append(int(self._vocabulary[self._draft.lm_head(normed).argmax()]))
        return proposed

    def ahead(self, ids: list[int], count: int) -> Iterator[torch.Tensor]:
        """Yield the normed hidden states (H,) of ``count`` drafting steps.

        The first needs no id; each further one feeds the next of ``ids``, which may grow meanwhile.
        """
        state = self._state
        assert state is not None
        yield state.normed[0, -1]
        for i in range(count - 1):
            state = self._step([ids[i]], state.feedback[:, -1:], state)
            yield state.normed[0, -1]

    def _step(self, ids: list[int], hidden: torch.Tensor, cached: "_State | None") -> "_State":
        """Run the layer over T tokens, behind the cached ones."""
        layer, T = self._draft.midlayer, len(ids)
        start = cached.keys.shape[2] if cached else 0
        embedded = F.embedding(torch.tensor([ids]), self._embed_tokens).to(hidden.dtype)
        cos, sin = self._draft.rotary(hidden, torch.arange(start, start + T)[None])
        q, keys, values = layer.self_attn.project(layer.attention_inputs(embedded, hidden), cos, sin)
        if cached:
            keys, values = torch.cat((cached.keys, keys), dim=2), torch.cat((cached.values, values), dim=2)
        is_visible = torch.ones(T, start + T, dtype=torch.bool).tril(start)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=is_visible)
        streamed = layer.after_attention(hidden, attended)
        normed = self._draft.norm(streamed)
        return _State(keys=keys, values=values, normed=normed, feedback=self._draft.feedback(streamed, normed))


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The draft behind its last step."""

    keys: torch.Tensor
    """(1, n, all tokens so far, D)"""
    values: torch.Tensor
    normed: torch.Tensor
    """(1, T, H), what the head reads"""
    feedback: torch.Tensor
    """(1, T, H), what the next step reads"""
