"""SpecForge's training command on a CPU."""

import specforge.algorithms.eagle3.model as eagle3_model
from specforge.cli import main
from specforge.core.loss import _compute_loss

__all__ = ["main"]


class PlainLoss:
    """Its own loss without Triton, in the place of the one with."""

    apply = staticmethod(_compute_loss)


eagle3_model.LogSoftmaxLoss = PlainLoss
