"""Feature store -> batches -> draft -> checkpoint that the engines serve.

``pipeline`` trains, ``export`` writes the draft and refuses a wrong one, ``evaluate`` measures it. The target itself
is never loaded to train or export.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig
    from .loop.trainer import TrainSummary


class _CallablePackage(ModuleType):
    """``specx.train(config)``: importing any module of the package puts the package where a function would be."""

    def __call__(self, config: "TrainConfig") -> "TrainSummary":
        """Train, or resume, or return the summary of a run that is complete. Raises SpecxError."""
        from .pipeline import run

        return run(config)


sys.modules[__name__].__class__ = _CallablePackage
