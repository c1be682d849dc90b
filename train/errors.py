"""What can go wrong in training and export, as the user is told."""

from .. import SpecxError


class TrainError(SpecxError):
    """A run cannot start or go on."""


class ExportError(SpecxError):
    """A draft would not be served as it was trained; it is not written."""


class NotFiniteError(TrainError):
    """Loss or gradient of an optimizer step are not finite; the step was not taken."""

    def __init__(self, *, step: int, loss: float, gradient_norm: float, lr: float) -> None:
        super().__init__(
            f"loss {loss} and gradient norm {gradient_norm} at step {step}, at a learning rate of {lr:.3g}"
        )
        self.step = step
