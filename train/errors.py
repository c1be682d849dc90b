"""What can go wrong in training and export, as the user is told."""

from .. import SpecxError


class TrainError(SpecxError):
    """A run cannot start or go on."""


class ExportError(SpecxError):
    """A draft would not be served as it was trained; it is not written."""
