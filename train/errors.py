"""What can go wrong in training and export, as the user is told."""

from .. import SpecxError


class TrainError(SpecxError):
    """A run cannot start or go on."""


class ExportError(SpecxError):
    """A draft would not be served as it was trained; it is not written."""


class NotFiniteError(TrainError):
    """Loss or gradient of an optimizer step are not finite, and the step was not taken; or a held-out loss is not."""

    def __init__(self, what: str, *, step: int, is_held_out: bool = False) -> None:
        """``step`` is the one that was not taken, or the one behind which was validated."""
        super().__init__(what)
        self.step = step
        self.is_held_out = is_held_out
