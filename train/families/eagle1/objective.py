"""The loss of EAGLE-1 over a batch: the distance of predicted features, and of the logits they give.

EAGLE-2 is the same draft; there the engine drafts a tree by its confidence. Nothing is unrolled: the
draft is trained on the target's own features, with noise on them in place of its own errors.

Shapes: B rows, T tokens of a row, H hidden size, V vocabulary, R supervised anchors.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...data.batch import Batch
from ...data.target_head import HeadTransform
from ...loss.metrics import StepCounts
from ...loss.target_distribution import Vocabulary
from .draft import Eagle1Draft

LOGITS_AT_ONCE = 2**26
"""Of each kind, in a chunk of rows: 256 MB in float32."""


def feature_loss(
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
    assert batch.anchors is not None
    features = batch.last_hidden.to(embedded.dtype)
    predicted = draft(embedded, inputs, batch)
    row, t = batch.anchors[0].nonzero(as_tuple=True)  # (R,)
    ours, theirs = predicted[row, t], features[row, t + 1]  # (R, H)
    regression = F.smooth_l1_loss(ours.float(), theirs.float(), reduction="none").mean(-1).sum()
    cross_entropy, overlap, proposed = _against_logits(ours, theirs, vocabulary, logits_at_once)
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
    ours: torch.Tensor, theirs: torch.Tensor, vocabulary: Vocabulary, logits_at_once: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return summed cross-entropy, summed min(p, q), and the ids (R,) proposed from features (R, H).

    Logits over the full vocabulary are made a chunk of rows at a time, and again in the backward pass.
    """
    head, transform = vocabulary.target_head, vocabulary.head_transform
    rows = max(1, logits_at_once // len(head))
    parts = [
        checkpoint(_chunk, mine, true, head, transform, use_reentrant=False, preserve_rng_state=False)
        for mine, true in zip(torch.split(ours, rows), torch.split(theirs, rows), strict=True)
    ]
    cross_entropy, overlap, proposed = zip(*parts, strict=True)
    return torch.stack(cross_entropy).sum(), torch.stack(overlap).sum(), torch.cat(proposed)


def _chunk(
    ours: torch.Tensor, theirs: torch.Tensor, head: torch.Tensor, transform: HeadTransform
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = transform(F.linear(ours.to(head.dtype), head).float())  # (rows, V)
    with torch.no_grad():
        p = transform(F.linear(theirs.to(head.dtype), head).float()).softmax(-1)
        overlap = torch.minimum(p, logits.softmax(-1)).sum()
    cross_entropy = (logits.logsumexp(-1) - (p * logits).sum(-1)).sum()
    return cross_entropy, overlap, logits.argmax(-1)
