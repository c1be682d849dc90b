"""What runs the target: one file an engine.

An engine is built once and asked for one sample after another.
"""

from typing import Protocol

from ...storage.schema import SequenceFeatures
from ..samples import Sample


class NotFiniteError(Exception):
    """The target gave NaN or infinity for a sample; its row is rejected with this message."""


class Engine(Protocol):
    """Computes the features of samples."""

    def features(self, sample: Sample) -> SequenceFeatures:
        """Return the features of one sample, which do not depend on any other; raise NotFiniteError."""
        ...
