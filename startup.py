"""Importing what a command needs in less time: it is most of what one waits for before the first training step."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core.imports import RequirementCache


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in the block what has not been imported yet.

    The collector rests, which would go through all that libraries define time and again and find nothing to free; what
    they defined is then left out of its later rounds. And torchmetrics, which lightning imports, is told that there is
    no transformers: it would import it for scores of texts, which no one here computes.
    """
    is_met = RequirementCache.__bool__

    def is_met_by_others(cache: RequirementCache) -> bool:
        return not (cache.requirement or "").startswith("transformers") and is_met(cache)

    gc.disable()
    RequirementCache.__bool__ = is_met_by_others  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        RequirementCache.__bool__ = is_met  # type: ignore[method-assign]
        gc.freeze()
        # Else what they say of objects left over at the end, if they look for them, would be of these.
        atexit.register(gc.unfreeze)
        gc.enable()
