"""EAGLE-1 (arXiv 2401.15077): a draft that predicts the target's next last hidden state.

EAGLE-2 is the same draft; there the engine drafts a tree by its confidence. Nothing is unrolled: the
draft is trained on the target's own features, with noise on them in place of its own errors.

Shapes: B rows, T tokens of a row, H hidden size, V vocabulary, R supervised anchors.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...data.batch import Batch
from ...layers.modules import DraftAttention, DraftMLP, RMSNorm
from ...loss.target_distribution import Vocabulary
from ...rope.rotary import RotaryEmbedding
from ..eagle3.objective import StepCounts, supervised_anchors
from ..spec import DraftSpec

LOGITS_AT_ONCE = 2**26
"""Of each kind, in a chunk of rows: 256 MB in float32."""


class Eagle1Layer(nn.Module):
    """A Llama decoder layer without the norm before attention."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.self_attn = DraftAttention(spec, spec.hidden_size)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = DraftMLP(spec.hidden_size, spec.intermediate_size)


class Eagle1Draft(nn.Module):
    """A whole draft but for embedding and head, which are the target's and frozen."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
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

    def fuse(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """Return the first hidden state (B, T, H): the target's last one as it is."""
        return last_hidden

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

    def forward(
        self, embedded: torch.Tensor, last_hidden: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor
    ) -> torch.Tensor:
        """Predict the last hidden state of token t + 1 at each t (B, T, H).

        embedded     (B, T, H)  embedding of each token
        last_hidden  (B, T, H)  of each token
        positions    (B, T)     within the document
        documents    (B, T)     number of the document; tokens attend within theirs only
        """
        is_visible = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        ahead = F.pad(embedded[:, 1:], (0, 0, 0, 1))
        inputs, entered = self.enter(ahead, last_hidden)
        cos, sin = self.rotary(inputs, positions)
        q, k, v = self.attention.project(inputs, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible)
        return self.leave(entered, attended)[0]


def evaluate_eagle1(
    draft: Eagle1Draft,
    embedded: torch.Tensor,
    inputs: torch.Tensor,
    batch: Batch,
    vocabulary: Vocabulary,
    *,
    logit_loss_weight: float,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> list[StepCounts]:
    """Compare the predicted features with the target's, as the one step there is.

    ``embedded`` (B, T, H); ``inputs`` (B, T, H) are the last hidden states as the draft is to see them;
    ``vocabulary`` is the full one. The loss of an anchor is the smooth L1 of its feature,
    the mean over H, and ``logit_loss_weight`` times the cross-entropy of the target's head on both features.
    """
    assert batch.last_hidden is not None
    features = batch.last_hidden.to(embedded.dtype)
    predicted = draft(embedded, inputs, batch.positions, batch.documents)
    row, t = supervised_anchors(batch, 1)[0].nonzero(as_tuple=True)  # (R,)
    ours, theirs = predicted[row, t], features[row, t + 1]  # (R, H)
    regression = F.smooth_l1_loss(ours.float(), theirs.float(), reduction="none").mean(-1).sum()
    cross_entropy, overlap, proposed = _against_logits(ours, theirs, vocabulary.target_head, logits_at_once)
    greedy = (proposed == batch.argmax[row, t + 1]).sum().float()
    text = (proposed == batch.input_ids[row, t + 2]).sum().float()
    anchors = torch.tensor(float(len(t)), device=t.device)
    return [
        StepCounts(
            anchors=anchors,
            greedy_hits=greedy,
            text_hits=text,
            greedy_prefixes=greedy,
            text_prefixes=text,
            overlap=overlap,
            loss=regression + logit_loss_weight * cross_entropy,
            labels=anchors,
        )
    ]


def _against_logits(
    ours: torch.Tensor, theirs: torch.Tensor, head: torch.Tensor, logits_at_once: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return summed cross-entropy, summed min(p, q), and the ids (R,) proposed from features (R, H).

    Logits over the full vocabulary are made a chunk of rows at a time, and again in the backward pass.
    """
    rows = max(1, logits_at_once // len(head))
    parts = [
        checkpoint(_chunk, mine, true, head, use_reentrant=False, preserve_rng_state=False)
        for mine, true in zip(torch.split(ours, rows), torch.split(theirs, rows), strict=True)
    ]
    cross_entropy, overlap, proposed = zip(*parts, strict=True)
    return torch.stack(cross_entropy).sum(), torch.stack(overlap).sum(), torch.cat(proposed)


def _chunk(
    ours: torch.Tensor, theirs: torch.Tensor, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = F.linear(ours.to(head.dtype), head).float()  # (rows, V)
    with torch.no_grad():
        p = F.linear(theirs.to(head.dtype), head).float().softmax(-1)
        overlap = torch.minimum(p, logits.softmax(-1)).sum()
    cross_entropy = (logits.logsumexp(-1) - (p * logits).sum(-1)).sum()
    return cross_entropy, overlap, logits.argmax(-1)
