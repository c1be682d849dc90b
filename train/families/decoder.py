"""An exported draft, run as engines run it: one token at a time with a KV cache.

Shapes: T new tokens, L boundaries, H hidden size, n heads, D head dimension,
Vd draft vocabulary. One sequence at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .eagle3.draft import Draft
from .load import ExportedDraft


class DraftDecoder:
    """Drafts for one sequence; ``extend`` follows the target, ``propose`` runs ahead of it."""

    def __init__(
        self, exported: ExportedDraft, embed_tokens: torch.Tensor, lm_head: torch.Tensor | None = None
    ) -> None:
        """``embed_tokens`` and ``lm_head`` (V, H) are the target's; an EAGLE-1 draft has no head but this."""
        self._draft = exported.draft
        self._vocabulary = exported.vocabulary
        self._embed_tokens = embed_tokens
        own = self._draft.lm_head.weight if isinstance(self._draft, Draft) else lm_head
        assert own is not None
        self._lm_head = own
        self._state: _State | None = None

    @torch.inference_mode()
    def extend(self, next_ids: list[int], features: torch.Tensor) -> None:
        """Take in T verified tokens: the id behind each one, and its features.

        Those are auxiliary hidden states (T, L, H), for EAGLE-1 last hidden states (T, H).
        """
        self._state = self._step(next_ids, self._draft.fuse(features[None]), self._state)

    @torch.inference_mode()
    def propose(self, count: int) -> list[int]:
        """Return the ids of ``count`` drafted tokens, greedily; the cache is left as it was."""
        proposed: list[int] = []
        for normed in self.ahead(proposed, count):
            proposed.append(int(self._vocabulary[F.linear(normed, self._lm_head).argmax()]))
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
        draft, T = self._draft, len(ids)
        start = cached.keys.shape[2] if cached else 0
        embedded = draft.embed(torch.tensor([ids]), self._embed_tokens).to(hidden.dtype)
        cos, sin = draft.rotary(hidden, torch.arange(start, start + T)[None])
        inputs, entered = draft.enter(embedded, hidden)
        q, keys, values = draft.attention.project(inputs, cos, sin)
        if cached:
            keys, values = torch.cat((cached.keys, keys), dim=2), torch.cat((cached.values, values), dim=2)
        is_visible = torch.ones(T, start + T, dtype=torch.bool).tril(start)
        if draft.spec.sliding_window is not None:
            is_visible = is_visible.triu(start - draft.spec.sliding_window + 1)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=is_visible)
        normed, feedback = draft.leave(entered, attended)
        return _State(keys=keys, values=values, normed=normed, feedback=feedback)


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
