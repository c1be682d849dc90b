"""Data set -> token ids and loss mask -> target -> feature store.

``pipeline`` is the way in; ``data`` reads rows and renders conversations, ``target`` reads the model's files and
``engines`` runs it; ``regenerate`` has the target answer prompts.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ExtractConfig
    from .pipeline import ExtractSummary


class _CallablePackage(ModuleType):
    """``specx.extract(config)``: importing any module of the package puts the package where a function would be."""

    def __call__(self, config: "ExtractConfig") -> "ExtractSummary":
        """Run the target once over the data and keep its features. Raises SpecxError."""
        from .pipeline import run

        return run(config)


sys.modules[__name__].__class__ = _CallablePackage
