"""Settings of ``specx export`` and ``specx rope-check``."""

from typing import Literal

from ...config import RunConfig


class ExportConfig(RunConfig):
    """Which draft to write, and how."""

    run: str
    """Directory that `specx train --out` wrote."""
    out: str
    """Directory to write the draft to; must not exist."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the exported weights."""
    format: Literal["native", "speculators"] = "native"
    """Checkpoint format: native, which vLLM and SGLang load by themselves, or speculators for vLLM."""
    engine: Literal["vllm", "sglang", "both"] = "both"
    """Engine that must be able to serve the draft; both means every engine that can."""
    target: str | None = None
    """Name or directory of the target, which the speculators format records."""
    checkpoint: Literal["best", "last"] | None = None
    """Checkpoint to export. By default the best if the run has one, else the last."""


class RopeCheckConfig(RunConfig):
    """A draft and its target."""

    target: str
    """Local directory or hub id of the target; only its config is read."""
    draft: str
    """Exported draft, or directory of a run."""
