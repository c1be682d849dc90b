"""``specx evaluate``: decode with the draft and without, and compare."""

import json
from pathlib import Path
from typing import Any

import torch

from ..contract import CONFIG_FILE
from ..errors import TrainError
from ..forms import is_draft as is_of_draft
from .config import EvaluateConfig
from .prompts import read_prompts
from .result import EvaluateSummary, summarise
from .task import DecodingTask


def run(config: EvaluateConfig) -> EvaluateSummary:
    """Return how the draft does; raise SpecxError."""
    target, draft = Path(config.target), Path(config.draft)
    vocab_size = _model_config(target, "--target", is_draft=False)["vocab_size"]
    _model_config(draft, "--draft", is_draft=True)
    prompts = read_prompts(config)
    if wrong := [index for prompt in prompts for index in prompt.ids if not 0 <= index < vocab_size]:
        raise TrainError(
            f"{', '.join(config.data)}: token id {wrong[0]}, the vocabulary of {target} has {vocab_size}. "
            "Give prompts of this target."
        )
    # On a CPU bfloat16 decides near-ties by chance, and then nothing is lossless.
    is_exact = config.dtype == "auto" and not torch.cuda.is_available()
    task = DecodingTask(
        target=target,
        draft=draft,
        prompts=prompts,
        num_speculative_tokens=config.num_speculative_tokens,
        max_new_tokens=config.max_new_tokens,
        stop_ids=_stop_ids(target),
        temperature=config.temperature,
        dtype="float32" if is_exact else config.dtype,
    )
    if config.engine == "vllm":
        from . import vllm

        drafted, baseline = vllm.decode(task)
    elif config.temperature:
        raise TrainError(
            f"--engine transformers is greedy, found --temperature {config.temperature}. Use --engine vllm."
        )
    else:
        from . import chain

        drafted, baseline = chain.decode(task)
    return summarise(
        drafted,
        baseline,
        num_speculative_tokens=config.num_speculative_tokens,
        is_greedy=config.temperature == 0,
    )


def _model_config(path: Path, option: str, *, is_draft: bool) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise TrainError(f"{path}: no readable {CONFIG_FILE}. Give {option} the directory of a model.") from error
    if is_of_draft(config) != is_draft:
        expected = "a draft that `specx export` wrote" if is_draft else "the target, not a draft"
        raise TrainError(f"{path}: found architectures {config.get('architectures')}; {option} takes {expected}.")
    return config


def _stop_ids(target: Path) -> frozenset[int]:
    """Return the ids that end a generation, by the target's own generation config."""
    path = target / "generation_config.json"
    source = path if path.is_file() else target / CONFIG_FILE
    ids = json.loads(source.read_text()).get("eos_token_id")
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
