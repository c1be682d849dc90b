"""What a draft is trained for, and how well it does: loss and metrics over the unrolled steps.

Step k at anchor t predicts token t + k + 2; its label is the target's distribution
at token t + k + 1, restricted to the draft vocabulary and renormalised.

Shapes: B rows, T tokens, N = B * T, K unrolled steps, V target vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...data.batch import PADDING, Batch
from ...layers.computed_rows import computed_rows
from ...loss.chunked_loss import Comparison, StepResults, joint_loss
from ...loss.divergences import LossName
from ...loss.target_distribution import Vocabulary
from .draft import Draft
from .unroll import unroll


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is to become small."""

    loss: LossName
    """Of the draft's distribution against the target's at one label."""
    step_weights: tuple[float, ...]
    """Of the steps, with a sum of 1, so that the learning rate does not depend on K."""


@dataclass(kw_only=True, slots=True)
class StepCounts:
    """Sums over the supervised anchors of one step; a token outside the draft vocabulary is a miss."""

    anchors: torch.Tensor
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
    """Summed over the anchors whose label counts."""
    labels: torch.Tensor
    """Anchors whose label counts: the target's best token is in the draft vocabulary."""

    def add(self, other: "StepCounts") -> None:
        """Add another batch's sums."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def step_weights(steps: int, decay: float) -> tuple[float, ...]:
    """Return ``decay**k`` normalised to a sum of 1."""
    return normalised_weights([decay**k for k in range(steps)])


def normalised_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the same shares with a sum of 1."""
    return tuple(weight / sum(weights) for weight in weights)


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


def count_labels(batch: Batch, t2d: torch.Tensor, steps: int) -> torch.Tensor:
    """Return (K,) float32: ``labels`` of the ``StepCounts`` of each step, without running the draft.

    ``t2d`` (V,) bool. Of the batch only masks, documents and argmax are looked at.
    """
    found = []
    for step, anchors in enumerate(supervised_anchors(batch, steps)):
        row, t = anchors.nonzero(as_tuple=True)
        found.append(t2d[batch.argmax[row, t + step + 1]].sum())
    return torch.stack(found).float()


def evaluate(
    draft: Draft,
    embed_tokens: torch.Tensor,
    batch: Batch,
    vocabulary: Vocabulary,
    objective: Objective,
    *,
    dtype: torch.dtype,
    labels: torch.Tensor | None = None,
    with_metrics: bool = True,
) -> tuple[torch.Tensor, list[StepCounts] | None]:
    """Unroll the draft over a batch and compare each step with the target; return the loss and each step's sums.

    ``embed_tokens`` (V, H) are the target's; matrices are multiplied in ``dtype``. ``labels`` (K,) float32 are those
    of all batches of the optimizer step, if it has others beside this one: the losses of all of them then add up to
    the mean over all their labels. Without ``with_metrics`` there are no sums: they take longer than the loss alone.
    """
    steps = len(objective.step_weights)
    anchors = supervised_anchors(batch, steps)
    rows = computed_rows(batch, anchors[0])
    if labels is None:
        labels = count_labels(batch, vocabulary.t2d, steps)
    comparison = Comparison(
        batch=batch,
        rows=rows,
        anchors=torch.stack([each.flatten() for each in anchors]),
        weights=labels.new_tensor(objective.step_weights) / labels.clamp(min=1.0),
        vocabulary=vocabulary,
        loss=objective.loss,
        dtype=dtype,
        with_metrics=with_metrics,
    )
    # What is multiplied in which type is decided here and not by autocast, which would convert again and again.
    with torch.autocast(batch.input_ids.device.type, enabled=False):
        outputs = unroll(draft, embed_tokens, batch, rows, steps, dtype)
        loss, results = joint_loss(outputs, draft.lm_head.weight, comparison)
    return loss, step_counts(comparison, results) if with_metrics else None


def step_counts(comparison: Comparison, results: StepResults) -> list[StepCounts]:
    """Return the sums of each step; ``results`` are with metrics."""
    counts = []
    batch = comparison.batch
    best, text = batch.argmax.flatten(), batch.input_ids.flatten()
    greedy_so_far = text_so_far = torch.ones_like(comparison.anchors[0])
    for step, (anchors, proposed) in enumerate(zip(comparison.anchors, results.proposed, strict=True)):
        # The ends wrap around to where no anchor is.
        greedy = anchors & (proposed == best.roll(-step - 1))
        same = anchors & (proposed == text.roll(-step - 2))
        greedy_so_far, text_so_far = greedy_so_far & greedy, text_so_far & same
        sums = torch.stack((anchors, greedy, same, greedy_so_far, text_so_far)).sum(1).float()
        counts.append(
            StepCounts(
                anchors=sums[0],
                greedy_hits=sums[1],
                text_hits=sums[2],
                greedy_prefixes=sums[3],
                text_prefixes=sums[4],
                overlap=results.overlap[step],
                loss=results.sums[step],
                labels=results.counts[step],
            )
        )
    return counts


def total_loss(
    counts: list[StepCounts], weights: tuple[float, ...], labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted mean of the steps' losses, each over its labels or over ``labels`` (K,); 0 without any."""
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
