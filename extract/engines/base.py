"""What runs the target: one file an engine.

An engine is given samples one after another and writes their features itself, in
whichever process they come to be; only what became of them travels back.
"""

from typing import Protocol

from ... import SpecxError
from ...storage.schema import Reject
from ..data.samples import Sample
from .sink import Outcome


class EngineError(SpecxError):
    """The engine cannot run the target, or gave something that cannot be true."""


class EngineDiedError(EngineError):
    """The engine's own process has died; another engine may do better with the same samples."""


class ExtractionEngine(Protocol):
    """Runs samples through the target and commits their features."""

    def add(self, sample: Sample) -> None:
        """Take a sample; return when the engine can take another. Raises SpecxError."""
        ...

    def reject(self, reject: Reject) -> None:
        """Take note of a row that is no sample, for the next commit record."""
        ...

    def take(self) -> Outcome:
        """Return what became of the samples since the last call. Raises SpecxError."""
        ...

    def finish(self) -> None:
        """Run all samples to their end and commit them; ``take`` then tells the rest. Raises SpecxError."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; what was not committed is lost."""
        ...
