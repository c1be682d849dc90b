"""The loss of EAGLE-3's unrolled steps over a batch.

Step k at anchor t predicts token t + k + 2; its label is the target's distribution
at token t + k + 1, restricted to the draft vocabulary and renormalized.

Shapes: B rows, T tokens, N = B * T, K unrolled steps, V target vocabulary.
"""

from dataclasses import dataclass

import torch

from ...data.batch import Batch
from ...layers.computed_rows import computed_rows
from ...loss.anchors import count_labels
from ...loss.chunked_loss import Comparison, joint_loss, step_counts
from ...loss.metrics import StepCounts
from ...loss.names import LossName
from ...loss.target_distribution import Vocabulary
from .draft import Eagle3Draft
from .unroll import unroll


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Which loss, and the weight of each step in it."""

    loss: LossName
    """Of the draft's distribution against the target's at one label."""
    step_weights: tuple[float, ...]
    """Of the steps, with a sum of 1, so that the learning rate does not depend on K."""


def unrolled_loss(
    draft: Eagle3Draft,
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
    assert batch.anchors is not None
    anchors, steps = batch.anchors, len(objective.step_weights)
    rows = computed_rows(batch, anchors[0])
    if labels is None:
        labels = count_labels(batch, anchors, vocabulary.t2d)
    comparison = Comparison(
        batch=batch,
        rows=rows,
        anchors=anchors.flatten(1),
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
