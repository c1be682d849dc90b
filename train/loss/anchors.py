"""Anchors: the tokens after which a draft is asked, and the labels that count there.

Step k at anchor t predicts token t + k + 2 and is compared with what the target says at token t + k + 1.

Shapes: B rows, T tokens, K steps, V target vocabulary.
"""

import torch

from ..data.batch import PADDING, Batch


def supervised_anchors(batch: Batch, steps: int) -> torch.Tensor:
    """Return for each step the anchors (K, B, T) bool whose tokens t + 1 … t + k + 2 are all supervised.

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
    return torch.stack(found)


def count_labels(batch: Batch, anchors: torch.Tensor, t2d: torch.Tensor) -> torch.Tensor:
    """Return (K,) float32: anchors (K, B, T) of each step where the target's best token is in the draft vocabulary.

    ``t2d`` (V,) bool. Of the batch only argmax is read.
    """
    found = []
    for step, of_step in enumerate(anchors):
        row, t = of_step.nonzero(as_tuple=True)
        found.append(t2d[batch.argmax[row, t + step + 1]].sum())
    return torch.stack(found).float()
