"""What can go wrong in a report, as the user is told."""

from .. import SpecxError


class ReportError(SpecxError):
    """There is nothing to report on, or no way to draw it."""
