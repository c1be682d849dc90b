"""Loss and metrics of an unrolled draft against the stored target.

Step k at anchor t predicts token t + k + 2; its label is the target's distribution
at token t + k + 1, restricted to the draft vocabulary and renormalised.

Shapes: B rows, T tokens, H hidden size, V target vocabulary, Vd draft vocabulary,
R supervised anchors of one step.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .batch import PADDING, Batch


class Vocabulary(nn.Module):
    """The draft vocabulary and the target's head over it; constants of a run."""

    d2t: torch.Tensor
    t2d: torch.Tensor
    target_head: torch.Tensor

    def __init__(self, d2t: torch.Tensor, t2d: torch.Tensor, target_head: torch.Tensor) -> None:
        """``d2t`` (Vd,) int64 offsets, ``t2d`` (V,) bool, ``target_head`` (Vd, H): the target's rows."""
        super().__init__()
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        # Comes from the store again on resume.
        self.register_buffer("target_head", target_head, persistent=False)

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Map draft ids to target ids, any shape."""
        return draft_ids + self.d2t[draft_ids]

    def draft_ids(self, target_ids: torch.Tensor) -> torch.Tensor:
        """Map target ids to draft ids, any shape; what is not in the draft vocabulary becomes Vd, one too large."""
        rank = self.t2d.cumsum(0) - 1  # ids of both vocabularies ascend alike
        return torch.where(self.t2d[target_ids], rank[target_ids], len(self.d2t))


@dataclass(kw_only=True, slots=True)
class StepCounts:
    """Sums over the supervised anchors of one step; a token outside the draft vocabulary is a miss."""

    anchors: torch.Tensor
    """R"""
    greedy_hits: torch.Tensor
    """The draft's best token is the target's best."""
    text_hits: torch.Tensor
    """The draft's best token is the stored text's."""
    greedy_prefixes: torch.Tensor
    """All steps up to this one were greedy hits."""
    text_prefixes: torch.Tensor
    overlap: torch.Tensor
    """Sum of min(p, q) over tokens, p over the target's full vocabulary: the chance to accept a sample."""
    loss: torch.Tensor
    """Cross-entropy summed over the anchors whose label counts."""
    labels: torch.Tensor
    """Anchors whose label counts: the target's best token is in the draft vocabulary."""

    def add(self, other: "StepCounts") -> None:
        """Add another batch's sums."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def supervised_anchors(batch: Batch, steps: int) -> list[torch.Tensor]:
    """Return for each step the anchors (B, T) bool whose tokens t + 1 … t + k + 2 are all supervised.

    They are also all of the anchor's document: what the engine asks the draft at inference, no more.
    """
    T = batch.input_ids.shape[1]
    anchors = batch.documents != PADDING
    found = []
    for ahead in range(1, steps + 2):
        shifted = torch.zeros_like(anchors)
        if ahead < T:
            same = batch.documents[:, ahead:] == batch.documents[:, : T - ahead]
            shifted[:, : T - ahead] = batch.loss_mask[:, ahead:] & same
        anchors = anchors & shifted
        if ahead >= 2:
            found.append(anchors)
    return found


def step_weights(steps: int, decay: float) -> list[float]:
    """Return ``decay**k`` normalised to a sum of 1, so that the learning rate does not depend on K."""
    weights = [decay**k for k in range(steps)]
    return [weight / sum(weights) for weight in weights]


def evaluate_steps(
    lm_head: nn.Linear, outputs: list[torch.Tensor], batch: Batch, vocabulary: Vocabulary
) -> list[StepCounts]:
    """Compare each step's normed hidden state (B, T, H) with the target; ``loss`` carries the gradient."""
    counts = []
    shape = batch.input_ids.shape
    greedy_so_far = torch.ones(shape, dtype=torch.bool, device=batch.input_ids.device)
    text_so_far = greedy_so_far.clone()
    for step, (normed, anchors) in enumerate(zip(outputs, supervised_anchors(batch, len(outputs)), strict=True)):
        row, t = anchors.nonzero(as_tuple=True)  # (R,)
        seen = t + step + 1
        best = batch.argmax[row, seen]
        logits = lm_head(normed[row, t]).float()  # (R, Vd)
        if batch.last_hidden is not None:
            cross_entropy, overlap = _exact_loss(logits, batch.last_hidden[row, seen], batch.lse[row, seen], vocabulary)
        else:
            assert batch.topk_ids is not None
            assert batch.topk_logprob is not None
            cross_entropy, overlap = _topk_loss(
                logits, vocabulary.draft_ids(batch.topk_ids[row, seen]), batch.topk_logprob[row, seen].float()
            )
        with torch.no_grad():
            proposed = vocabulary.target_ids(logits.argmax(-1))
            greedy, text = proposed == best, proposed == batch.input_ids[row, seen + 1]
            greedy_so_far, text_so_far = (
                _prefix(greedy_so_far, row, t, greedy),
                _prefix(text_so_far, row, t, text),
            )
        has_label = vocabulary.t2d[best]
        counts.append(
            StepCounts(
                anchors=torch.tensor(float(len(t)), device=t.device),
                greedy_hits=greedy.sum().float(),
                text_hits=text.sum().float(),
                greedy_prefixes=greedy_so_far.sum().float(),
                text_prefixes=text_so_far.sum().float(),
                overlap=overlap,
                loss=(cross_entropy * has_label).sum(),
                labels=has_label.sum().float(),
            )
        )
    return counts


def _exact_loss(
    logits: torch.Tensor, last_hidden: torch.Tensor, lse: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy (R,) of draft logits (R, Vd), and the sum of min(p, q) over all rows.

    The target's logits over the draft vocabulary come from its last hidden states (R, H); ``lse`` (R,) is theirs
    over its full vocabulary.
    """
    with torch.no_grad():
        head = vocabulary.target_head
        target_logits = F.linear(last_hidden.to(head.dtype), head).float()
        p = target_logits.softmax(-1)
        p_full = (target_logits - lse[:, None]).exp()
        overlap = torch.minimum(p_full, logits.softmax(-1)).sum()
    return logits.logsumexp(-1) - (p * logits).sum(-1), overlap


def _topk_loss(logits: torch.Tensor, ids: torch.Tensor, logprob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same where only the target's top-K is known: ``ids`` and ``logprob`` (R, K), ids as of ``draft_ids``.

    L = -Σ p_i log q_i - r log q_tail: the mass r beyond the top-K is one bucket, and so is what the draft gives all
    its tokens but these. Top-K tokens outside the draft vocabulary are dropped and the rest renormalised; the
    bucket is taken as inside. The overlap leaves the bucket out, as which of its tokens agree is not known.
    """
    Vd = logits.shape[1]
    is_known = ids < Vd
    with torch.no_grad():
        p_full = logprob.exp()
        tail = (1 - p_full.sum(-1)).clamp(min=0)
        p = torch.where(is_known, p_full, 0)
        total = (p.sum(-1) + tail).clamp(min=torch.finfo(p.dtype).tiny)
    log_q = logits.log_softmax(-1)
    # A column more, for ids that the draft cannot propose. 1 - Σ q over the top-K would cancel: the others are summed.
    is_tail = torch.ones(len(logits), Vd + 1, dtype=torch.bool, device=logits.device).scatter(1, ids, False)[:, :Vd]
    log_q_tail = log_q.masked_fill(~is_tail, torch.finfo(log_q.dtype).min).logsumexp(-1)
    # Where the top-K holds the whole draft vocabulary there is no bucket.
    tail_term = torch.where(is_tail.any(-1), tail * log_q_tail, 0)
    chosen = log_q.gather(1, ids.clamp(max=Vd - 1))
    cross_entropy = -((p * chosen).sum(-1) + tail_term) / total
    overlap = torch.minimum(p, chosen.detach().exp()).sum()
    return cross_entropy, overlap


def _prefix(so_far: torch.Tensor, row: torch.Tensor, t: torch.Tensor, hits: torch.Tensor) -> torch.Tensor:
    """Keep the anchors that are of this step, were hits in all before, and are hits now."""
    kept = torch.zeros_like(so_far)
    kept[row, t] = so_far[row, t] & hits
    return kept


def count_labels(batch: Batch, t2d: torch.Tensor, steps: int) -> torch.Tensor:
    """Return (K,) float32: ``labels`` of the ``StepCounts`` of each step, without running the draft.

    ``t2d`` (V,) bool. Of the batch only masks, documents and argmax are looked at.
    """
    found = []
    for step, anchors in enumerate(supervised_anchors(batch, steps)):
        row, t = anchors.nonzero(as_tuple=True)
        found.append(t2d[batch.argmax[row, t + step + 1]].sum())
    return torch.stack(found).float()


def total_loss(counts: list[StepCounts], decay: float, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Return the weighted mean cross-entropy over the steps; 0 for a batch without labels.

    ``labels`` (K,) float32 are those of all batches of an optimizer step, if it has others beside this one: the
    losses of all of them then add up to the mean over all their labels.
    """
    weights = step_weights(len(counts), decay)
    totals = [step.labels for step in counts] if labels is None else labels.unbind()
    terms = [w * step.loss / n.clamp(min=1.0) for w, step, n in zip(weights, counts, totals, strict=True)]
    return torch.stack(terms).sum()


def metrics(counts: list[StepCounts]) -> dict[str, float]:
    """Return accuracies, overlap and simulated acceptance lengths from summed counts.

    Acceptance length = 1 + Σ_k mean of "all steps up to k hit": the joint prefix and the bonus token.
    """
    values: dict[str, float] = {}
    greedy_length = text_length = 1.0
    for k, step in enumerate(counts):
        anchors = max(float(step.anchors), 1.0)
        values[f"accuracy_{k}"] = float(step.greedy_hits) / anchors
        values[f"text_accuracy_{k}"] = float(step.text_hits) / anchors
        values[f"overlap_{k}"] = float(step.overlap) / anchors
        values[f"loss_{k}"] = step.loss.item() / max(float(step.labels), 1.0)
        greedy_length += float(step.greedy_prefixes) / anchors
        text_length += float(step.text_prefixes) / anchors
    values["accuracy"] = values["accuracy_0"]
    values["acceptance_length"] = greedy_length
    values["text_acceptance_length"] = text_length
    values["vocabulary_coverage"] = float(counts[0].labels) / max(float(counts[0].anchors), 1.0)
    return values
