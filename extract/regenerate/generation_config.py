"""How a target samples and ends its answers, by its own ``generation_config.json`` where a run does not say."""

import json
from typing import Any

from ...hub import TargetError
from ..target import Target, identify
from .answer_file import AnswerSettings
from .config import RegenerateConfig


def answer_settings(config: RegenerateConfig, target: Target, date: str) -> AnswerSettings:
    """Return what the answers of this run will have in common; raise TargetError if the target's own is unusable."""
    return AnswerSettings(
        target=identify(target),
        dtype=target.dtype if config.dtype == "auto" else config.dtype,
        temperature=_chosen(config.temperature, target, "temperature", 1.0),
        top_p=_chosen(config.top_p, target, "top_p", 1.0),
        top_k=int(_chosen(config.top_k, target, "top_k", 0)),
        max_new_tokens=config.max_new_tokens,
        max_length=min(config.max_length or target.max_length, target.max_length),
        seed=config.seed,
        reasoning_effort=config.reasoning_effort,
        date=date,
    )


def stop_ids(target: Target) -> tuple[int, ...]:
    """Return the tokens that end an answer, such as harmony's ``<|return|>`` and ``<|call|>``."""
    found = _generation_config(target).get("eos_token_id", target.config.get("eos_token_id"))
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(each, int) for each in ids):
        raise TargetError(f"{target.path}: eos_token_id is {found!r}, expected a token id or several.")
    return tuple(ids)


def _chosen(wanted: float | None, target: Target, name: str, default: float) -> float:
    if wanted is not None:
        return float(wanted)
    # As vLLM serves it: do_sample is not looked at.
    own = _generation_config(target).get(name)
    if own is None:
        return default
    if isinstance(own, bool) or not isinstance(own, int | float):
        raise TargetError(f"{target.path}: its generation config has {name} {own!r}, expected a number.")
    return float(own)


def _generation_config(target: Target) -> dict[str, Any]:
    path = target.path / "generation_config.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise TargetError(f"{path}: not JSON: {error}. Download the model again.") from error
    if not isinstance(found, dict):
        raise TargetError(f"{path}: expected an object, found a {type(found).__name__}. Download it again.")
    return found
