"""What makes a command begin soon: most of what one waits for until the first training step is imports."""

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


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


def import_torch() -> None:
    """Import torch; its largest library, which takes 0.2 s, is loaded in a thread beside other imports."""
    torch = find_spec("torch")
    if torch is not None and torch.origin is not None and sys.platform == "linux":
        # One library is loaded at a time, so those that sympy needs come first.
        for name in ("array", "cmath", "decimal", "random", "unicodedata"):
            import_module(name)
        thread = threading.Thread(target=_load_libraries, args=(Path(torch.origin).parent / "lib",))
        thread.start()
        # All in Python, as long in coming as the library, and torch's compiler asks for it.
        import_module("sympy")
        thread.join()
    import_module("torch")


@contextmanager
def train_imports() -> Iterator[None]:
    """Import torch, then what training needs in the block, in the ways of the functions above and below."""
    with without_collector():
        import_torch()
        with without_text_metrics():
            yield


def _load_libraries(folder: Path) -> None:
    """Load libraries of torch as importing it would; where one cannot be loaded, importing it will tell.

    Called as a function ``dlopen`` lets go of the interpreter. ``ctypes.CDLL``, which calls it too, does not.
    """
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.restype = ctypes.c_void_p
    for name, flags in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL)):
        if dlopen(os.fsencode(folder / name), os.RTLD_NOW | flags) is None:
            return


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
