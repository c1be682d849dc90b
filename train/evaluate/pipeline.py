"""``specx evaluate``: decode with the draft and without, and compare."""

import json
from pathlib import Path

import torch

from ..contract import CONFIG_FILE
from ..errors import TrainError
from .config import EvaluateConfig
from .prompts import read_prompts
from .result import EvaluateSummary, summarise


def run(config: EvaluateConfig) -> EvaluateSummary:
    """Return how the draft does; raise SpecxError."""
    target, draft = Path(config.target), Path(config.draft)
    for path, option in ((target, "--target"), (draft, "--draft")):
        if not (path / CONFIG_FILE).is_file():
            raise TrainError(f"{path}: no {CONFIG_FILE} here. Give {option} the directory of a model.")
    prompts = read_prompts(config)
    dtype = config.dtype
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    stop_ids = _stop_ids(target)
    if config.engine == "vllm":
        from . import vllm

        drafted, baseline = vllm.decode(
            target=target,
            draft=draft,
            prompts=prompts,
            num_speculative_tokens=config.num_speculative_tokens,
            max_new_tokens=config.max_new_tokens,
            stop_ids=stop_ids,
            dtype=dtype,
            temperature=config.temperature,
        )
    else:
        if config.temperature:
            raise TrainError(
                f"--engine transformers is greedy, found --temperature {config.temperature}. Use --engine vllm."
            )
        from . import chain

        drafted, baseline = chain.decode(
            target=target,
            draft=draft,
            prompts=prompts,
            num_speculative_tokens=config.num_speculative_tokens,
            max_new_tokens=config.max_new_tokens,
            stop_ids=stop_ids,
            dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
        )
    return summarise(
        drafted,
        baseline,
        num_speculative_tokens=config.num_speculative_tokens,
        is_greedy=config.temperature == 0,
    )


def _stop_ids(target: Path) -> set[int]:
    """Return the ids that end a generation, by the target's own generation config."""
    path = target / "generation_config.json"
    source = path if path.is_file() else target / CONFIG_FILE
    ids = json.loads(source.read_text()).get("eos_token_id")
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}
