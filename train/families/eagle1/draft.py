"""The EAGLE-1 draft: one decoder layer that predicts the target's next last hidden state.

Shapes: B rows, T tokens of a row, H hidden size, V vocabulary, R tokens that are not padding, n heads,
D head dimension.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ...data.batch import PADDING, Batch
from ...layers.attention import attend
from ...layers.computed_rows import computed_rows
from ...layers.modules import DraftAttention, DraftMLP, RMSNorm
from ...rope.rotary import RotaryEmbedding
from ..autoregressive import AutoregressiveDraft
from .spec import Eagle1Spec


class Eagle1Layer(nn.Module):
    """A Llama decoder layer without the norm before attention."""

    def __init__(self, spec: Eagle1Spec) -> None:
        super().__init__()
        self.self_attn = DraftAttention(
            width=spec.hidden_size,
            heads=spec.num_attention_heads,
            kv_heads=spec.num_key_value_heads,
            head_dim=spec.head_dim,
            hidden_size=spec.hidden_size,
        )
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = DraftMLP(spec.hidden_size, spec.intermediate_size)


class Eagle1Draft(AutoregressiveDraft):
    """A whole draft but for embedding and head, which are the target's and frozen."""

    def __init__(self, spec: Eagle1Spec) -> None:
        super().__init__()
        self.spec: Eagle1Spec = spec
        self.fc = nn.Linear(2 * spec.hidden_size, spec.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle1Layer(spec)])
        self.rotary = RotaryEmbedding(spec.head_dim, spec.rope_parameters)

    @property
    def layer(self) -> Eagle1Layer:
        """The one layer."""
        layer = self.layers[0]
        assert isinstance(layer, Eagle1Layer)
        return layer

    @property
    def attention(self) -> DraftAttention:
        """The one attention."""
        return self.layer.self_attn

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Return the first hidden state (B, T, H): the target's last one as it is."""
        return features

    def embed(self, input_ids: torch.Tensor, target_embeddings: torch.Tensor) -> torch.Tensor:
        """Map ids (B, T) to the target's embeddings (B, T, H)."""
        return F.embedding(input_ids, target_embeddings)

    def enter(self, embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what attention reads, and what ``leave`` is to be given: the same (B, T, H)."""
        joined = self.fc(torch.cat((embedded, hidden), dim=-1))
        return joined, joined

    def leave(self, entered: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the head reads and what the next step takes: the same (B, T, H), as there is no final norm."""
        residual = entered + self.layer.self_attn.output(attended)
        predicted: torch.Tensor = residual + self.layer.mlp(self.layer.post_attention_layernorm(residual))
        return predicted, predicted

    def head(self, target_head: torch.Tensor) -> torch.Tensor:
        """Return the target's head."""
        return target_head

    def forward(self, embedded: torch.Tensor, last_hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Predict the last hidden state of token t + 1 at each t (B, T, H).

        embedded     (B, T, H)  embedding of each token
        last_hidden  (B, T, H)  of each token

        Of the batch positions and documents are read; tokens attend within their document only.
        """
        B, T = batch.documents.shape
        ahead = F.pad(embedded[:, 1:], (0, 0, 0, 1))
        inputs, entered = self.enter(ahead, last_hidden)
        cos, sin = self.rotary(inputs, batch.positions)
        q, keys, values = (each.transpose(1, 2).flatten(0, 1) for each in self.attention.heads_of(inputs, cos, sin))
        rows = computed_rows(batch, batch.documents != PADDING)
        # In tiles: a mask of (T, T) would not fit in memory for one long sequence.
        with torch.autocast(inputs.device.type, enabled=False):
            attended = attend(q.index_select(0, rows.flat), keys, values, [], [], rows, None)  # (R, n, D)
        every = torch.zeros_like(q).index_copy(0, rows.flat, attended)
        return self.leave(entered, every.view(B, T, *q.shape[1:]).transpose(1, 2))[0]
