"""An exported draft, run as engines run it: one token at a time with a KV cache.

Shapes: T new tokens, L boundaries, H hidden size, n heads, D head dimension,
Vd draft vocabulary. One sequence at a time.
"""

import json
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
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._length = 0
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def extend(self, next_ids: list[int], aux_hidden: torch.Tensor) -> None:
        """Take in T verified tokens: each one's auxiliary hidden states (T, L, H) and the id behind it."""
        hidden = self._draft.fuse(aux_hidden[None])
        streamed, normed, keys, values = self._step(next_ids, hidden, self._length, self._keys, self._values)
        self._keys, self._values = [keys], [values]
        self._length += len(next_ids)
        self._last = self._draft.feedback(streamed, normed)[:, -1:], normed[:, -1:]

    @torch.inference_mode()
    def propose(self, count: int) -> list[int]:
        """Return the ids of ``count`` drafted tokens, greedily; the cache is left as it was."""
        assert self._last is not None
        hidden, normed = self._last
        keys, values = self._keys, self._values
        proposed: list[int] = []
        for ahead in range(count):
            proposed.append(int(self._vocabulary[self._draft.lm_head(normed[0, -1]).argmax()]))
            if ahead + 1 < count:
                streamed, normed, k, v = self._step(proposed[-1:], hidden, self._length + ahead, keys, values)
                keys, values = [k], [v]
                hidden = self._draft.feedback(streamed, normed)
        return proposed

    def _step(
        self,
        ids: list[int],
        hidden: torch.Tensor,
        start: int,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the layer over T tokens from position ``start`` on, behind the cached keys and values."""
        layer, T = self._draft.midlayer, len(ids)
        embedded = F.embedding(torch.tensor([ids]), self._embed_tokens).to(hidden.dtype)
        cos, sin = self._draft.rotary(hidden, torch.arange(start, start + T)[None])
        q, k, v = layer.self_attn.project(layer.attention_inputs(embedded, hidden), cos, sin)
        k, v = torch.cat((*keys, k), dim=2), torch.cat((*values, v), dim=2)
        is_visible = torch.ones(T, k.shape[2], dtype=torch.bool).tril(k.shape[2] - T)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible)
        streamed = layer.after_attention(hidden, attended)
        return streamed, self._draft.norm(streamed), k, v
