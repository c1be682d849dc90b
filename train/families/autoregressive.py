"""Drafts that feed their own hidden state back, token by token: EAGLE's kind, as engines run them.

Shapes: B rows, T new tokens, N tokens of a flattened batch, R computed anchors, L boundaries, H hidden size, n heads,
D head dimension, V target vocabulary, Vd draft vocabulary.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..data.batch import Batch
from ..layers.attention import attend
from ..layers.computed_rows import Rows
from ..layers.modules import DraftAttention
from ..rope.rotary import RotaryEmbedding
from .base import DraftModel


class AutoregressiveDraft(DraftModel):
    """A draft of one decoder layer, in the pieces that an engine's step puts together."""

    rotary: RotaryEmbedding
    window: int | None = None
    """Sliding attention window, in tokens; None is full attention."""

    @property
    @abstractmethod
    def attention(self) -> DraftAttention:
        """The one attention."""

    @abstractmethod
    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Map the target's features, (B, T, L, H) or (B, T, H), to the first hidden state (B, T, H)."""

    @abstractmethod
    def embed(self, input_ids: torch.Tensor, target_embeddings: torch.Tensor) -> torch.Tensor:
        """Map ids (B, T) to embeddings (B, T, H), given those of the target (V, H)."""

    @abstractmethod
    def enter(self, embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what attention reads (B, T, its width), and what ``leave`` is to be given (B, T, H)."""

    @abstractmethod
    def leave(self, entered: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the head reads and what the next step takes as its hidden state, both (B, T, H)."""

    @abstractmethod
    def head(self, target_head: torch.Tensor) -> torch.Tensor:
        """Return the head (Vd, H): the draft's own, or that of the target (V, H)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The draft after its last step."""

    keys: torch.Tensor
    """(1, n, all tokens so far, D)"""
    values: torch.Tensor
    normed: torch.Tensor
    """(1, T, H), what the head reads"""
    feedback: torch.Tensor
    """(1, T, H), what the next step reads"""


class AutoregressiveProposer:
    """Drafts for one sequence, one token at a time with a KV cache."""

    def __init__(
        self,
        draft: AutoregressiveDraft,
        vocabulary: torch.Tensor,
        embed_tokens: torch.Tensor,
        lm_head: torch.Tensor,
    ) -> None:
        """``vocabulary`` (Vd,) are target ids; ``embed_tokens`` and ``lm_head`` (V, H) are the target's."""
        self._draft = draft
        self._vocabulary = vocabulary
        self._embed_tokens = embed_tokens
        self._lm_head = draft.head(lm_head)
        self._state: _State | None = None

    @torch.inference_mode()
    def extend(self, next_ids: list[int], features: torch.Tensor) -> None:
        """Take in T verified tokens: the id after each one, and its features."""
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

    def _step(self, ids: list[int], hidden: torch.Tensor, cached: _State | None) -> _State:
        """Run the layer over T tokens, after the cached ones."""
        draft, T = self._draft, len(ids)
        start = cached.keys.shape[2] if cached else 0
        embedded = draft.embed(torch.tensor([ids]), self._embed_tokens).to(hidden.dtype)
        cos, sin = draft.rotary(hidden, torch.arange(start, start + T)[None])
        inputs, entered = draft.enter(embedded, hidden)
        q, keys, values = draft.attention.project(inputs, cos, sin)
        if cached:
            keys, values = torch.cat((cached.keys, keys), dim=2), torch.cat((cached.values, values), dim=2)
        is_visible = torch.ones(T, start + T, dtype=torch.bool).tril(start)
        if draft.window is not None:
            is_visible = is_visible.triu(start - draft.window + 1)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=is_visible)
        normed, feedback = draft.leave(entered, attended)
        return _State(keys=keys, values=values, normed=normed, feedback=feedback)


def unroll_plainly(
    draft: AutoregressiveDraft, features: torch.Tensor, embed_tokens: torch.Tensor, batch: Batch, rows: Rows, steps: int
) -> list[torch.Tensor]:
    """Return for each of ``steps`` what the head reads (R, H) at the computed anchors of a batch.

    Step k at anchor t reads the stored token t + k + 1 where the engine feeds its own proposal: up to the first miss
    they are the same. ``features`` (N, …) are those of each token. The draft's own pieces are put together as they
    are, without the shortcuts that a training step takes.
    """
    ids, positions = batch.input_ids.flatten(), batch.positions.flatten()
    last = len(ids) - 1

    def project(at: torch.Tensor, hidden: torch.Tensor, step: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        following = ids[(at + step + 1).clamp(max=last)]
        embedded = draft.embed(following[None], embed_tokens).to(hidden.dtype)
        cos, sin = draft.rotary(hidden, (positions[at] + step)[None])
        inputs, entered = draft.enter(embedded, hidden)
        return entered, [each[0].transpose(0, 1) for each in draft.attention.project(inputs, cos, sin)]

    every = torch.arange(last + 1, device=ids.device)
    hidden = draft.fuse(features[None])
    entered, (q, first_keys, first_values) = project(every, hidden, 0)
    entered, q = entered[:, rows.flat], q[rows.flat]
    later_keys: list[torch.Tensor] = []
    later_values: list[torch.Tensor] = []
    outputs = []
    for step in range(steps):
        if step:
            entered, (q, keys, values) = project(rows.flat, hidden, step)
            later_keys.append(keys)
            later_values.append(values)
        attended = attend(q, first_keys, first_values, later_keys, later_values, rows, draft.window)
        read, hidden = draft.leave(entered, attended.transpose(0, 1)[None])
        outputs.append(read[0])
    return outputs
