"""``specx evaluate``: decode with the draft and without, and compare; or estimate without decoding."""

import json
import logging
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from ...hub import locate_target
from ..errors import TrainError
from ..families.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from ..families.load import recognize
from .chat_template import ChatTemplate
from .config import EvaluateConfig
from .engines.base import DecodingEngine, DecodingTask
from .estimate import EstimateSummary, estimate
from .prompts import Prompt, read_prompts
from .results_file import ResultsFile
from .summary import Compared, EvaluateSummary, summarise

_log = logging.getLogger(__name__)

_FREE = {"out", "url", "baseline_url", "batch_sizes", "data", "store", "target", "draft"}
"""Settings that may differ from one session to the next: where things lie; what lies there is recorded by its hash."""


def run(config: EvaluateConfig) -> EvaluateSummary | EstimateSummary:
    """Return how the draft does; raise SpecxError."""
    draft = Path(config.draft)
    if config.target is None:
        _model_config(draft, "--draft", is_draft=True)
        return estimate(config)
    target = locate_target(config.target, weights=config.engine != "server")
    model = _model_config(target, "--target", is_draft=False)
    _model_config(draft, "--draft", is_draft=True)
    prompts = read_prompts(config)
    if wrong := [index for prompt in prompts for index in prompt.ids if not 0 <= index < model["vocab_size"]]:
        raise TrainError(
            f"{', '.join(config.data)}: token id {wrong[0]}, the vocabulary of {target} has {model['vocab_size']}. "
            "Give prompts of this target."
        )
    # On a CPU bfloat16 decides near-ties by chance, and then nothing is lossless.
    is_exact = config.dtype == "auto" and not torch.cuda.is_available()
    is_in_turns = any(prompt.later_turns for prompt in prompts)
    task = DecodingTask(
        target=target,
        draft=draft,
        prompts=prompts,
        template=ChatTemplate(target, effort=config.reasoning_effort, date=config.date) if is_in_turns else None,
        num_speculative_tokens=config.num_speculative_tokens,
        max_new_tokens=config.max_new_tokens,
        max_length=model["max_position_embeddings"],
        stop_ids=_stop_ids(target),
        temperature=config.temperature,
        dtype="float32" if is_exact else config.dtype,
    )
    record = ResultsFile(config.out, _settings(config, prompts), prompts)
    measure(config, task, record)
    summary = summarise(
        [
            Compared(batch_size=size, drafted=record.passes[True, size], baseline=record.passes.get((False, size)))
            for size in config.measured_batch_sizes
        ],
        [prompt.category for prompt in prompts],
        num_speculative_tokens=config.num_speculative_tokens,
        is_greedy=config.temperature == 0,
        turns=sum(1 + len(prompt.later_turns) for prompt in prompts),
    )
    record.finish(asdict(summary))
    return summary


def measure(config: EvaluateConfig, task: DecodingTask, record: ResultsFile) -> None:
    """Do the passes that ``record`` lacks."""
    for is_drafted in (True, False):
        if config.engine == "server" and not is_drafted and config.baseline_url is None:
            continue
        missing = [size for size in config.measured_batch_sizes if (is_drafted, size) not in record.passes]
        if not missing:
            continue
        with _open_engine(config, task, is_drafted=is_drafted) as engine:
            for size in missing:
                decoded = engine.decode(size)
                record.add((is_drafted, size), decoded)
                length = f", acceptance length {decoded.tally.length:.3f}" if decoded.tally else ""
                _log.info(
                    "%s draft, batch size %d: %d turns, %.1f tokens/s%s",
                    "with" if is_drafted else "without",
                    size,
                    len(decoded.generations),
                    decoded.tokens_per_s,
                    length,
                )


def _open_engine(
    config: EvaluateConfig, task: DecodingTask, *, is_drafted: bool
) -> AbstractContextManager[DecodingEngine]:
    if config.engine == "vllm":
        from .engines import vllm_engine

        return vllm_engine.open_engine(task, is_drafted=is_drafted)
    if config.engine == "transformers":
        from .engines import transformers_engine

        return transformers_engine.open_engine(task, is_drafted=is_drafted)
    from .engines import http_engine

    url = config.url if is_drafted else config.baseline_url
    assert url is not None
    return http_engine.open_engine(task, url, is_drafted=is_drafted)


def _settings(config: EvaluateConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """Return what decides the result."""
    digest = xxhash.xxh128()
    for prompt in prompts:
        digest.update(json.dumps([prompt.ids, prompt.later_turns]).encode())
    weights = xxhash.xxh128()
    with (Path(config.draft) / WEIGHTS_FILE).open("rb") as file:
        while block := file.read(1 << 24):
            weights.update(block)
    settings = {key: value for key, value in config.model_dump().items() if key not in _FREE}
    return settings | {"prompts": digest.hexdigest(), "draft_weights": weights.hexdigest()}


def _model_config(path: Path, option: str, *, is_draft: bool) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise TrainError(f"{path}: no readable {CONFIG_FILE}. Give {option} the directory of a model.") from error
    if (recognize(config) is not None) != is_draft:
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
