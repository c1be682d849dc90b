"""Sums over supervised anchors, and the metrics made of them.

Shapes: N tokens of a flattened batch, K drafted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(kw_only=True, slots=True)
class StepCounts:
    """Sums over the supervised anchors of one drafted position; a token outside the draft vocabulary is a miss."""

    anchors: torch.Tensor
    greedy_hits: torch.Tensor
    """The draft's best token is the target's best."""
    text_hits: torch.Tensor
    """The draft's best token is the stored text's."""
    greedy_prefixes: torch.Tensor
    """All positions up to this one were greedy hits."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResults:
    """What the comparison found, without gradients."""

    sums: torch.Tensor
    """(K,) float32, losses summed over the labels of each step"""
    counts: torch.Tensor
    """(K,) float32, labels of each step"""
    proposed: torch.Tensor
    """(K, N) int64, the target id of the draft's best token at each anchor; -1 where it was not looked at"""
    overlap: torch.Tensor
    """(K,) float32, Σ min(p, q) over the anchors of each step, p over the target's full vocabulary"""


def decayed_weights(steps: int, decay: float) -> tuple[float, ...]:
    """Return ``decay**k`` normalized to a sum of 1."""
    return normalized_weights([decay**k for k in range(steps)])


def normalized_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the same shares with a sum of 1."""
    return tuple(weight / sum(weights) for weight in weights)


def total_loss(
    counts: list[StepCounts], weights: tuple[float, ...], labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted mean of the losses, each over its labels or over ``labels`` (K,); 0 without any."""
    totals = [step.labels for step in counts] if labels is None else labels.unbind()
    terms = [w * step.loss / n.clamp(min=1.0) for w, step, n in zip(weights, counts, totals, strict=True)]
    return torch.stack(terms).sum()


def metrics(counts: list[StepCounts]) -> dict[str, float]:
    """Return accuracies, overlap and simulated acceptance lengths from summed counts.

    Acceptance length = 1 + Σ_k mean of "all positions up to k hit": the joint prefix and the bonus token.
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
