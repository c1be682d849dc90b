"""What makes a command begin soon: most of what one waits for until the first training step is imports."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


def collect_rarely() -> None:
    """Let Python's collector run less often in this process.

    As libraries are imported it would go through all that they define time and again, and find nothing to free: a sixth
    of the time that vLLM takes to be imported.
    """
    gc.set_threshold(50_000, 20, 100)


@contextmanager
def without_collector() -> Iterator[None]:
    """Import libraries in the block without Python's collector, which goes through what they define at the end only."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Or what is left at the end is reported as leaks, by libraries that look.
        atexit.register(gc.unfreeze)
        gc.enable()


@contextmanager
def without_text_metrics() -> Iterator[None]:
    """Import lightning in the block, the first time, without transformers.

    Lightning imports torchmetrics, and that all of transformers for scores of texts, unless there is none.
    """
    from lightning_utilities.core.imports import RequirementCache

    is_met = RequirementCache.__bool__

    def is_met_by_others(cache: RequirementCache) -> bool:
        return not (cache.requirement or "").startswith("transformers") and is_met(cache)

    RequirementCache.__bool__ = is_met_by_others  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        RequirementCache.__bool__ = is_met  # type: ignore[method-assign]
