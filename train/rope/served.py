"""The rotary angles that vLLM and SGLang build from a draft's config, by their own rules and not by transformers'.

vllm     0.32, ``model_executor/layers/rotary_embedding``; the tests hold it against the real one
sglang   0.5.23, ``srt/layers/rotary_embedding`` and ``srt/models/llama.py``, as read: it does not import without a GPU

Both take the block as transformers' config class completes it: a missing theta is 10000, a missing
``original_max_position_embeddings`` the ``max_position_embeddings``, and one that stands beside the block overrides
it. Both then read a missing ``truncate`` as true. For the concentration they read different keys.

Shapes: R dimensions of a head that are rotated.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from transformers import LlamaConfig

from .frequencies import Angles, concentration, frequencies, mscale

Engine = Literal["vllm", "sglang"]


def served_angles(config: LlamaConfig, engine: Engine) -> Angles:
    """Return what an engine builds; ``config`` is the draft's layer.

    Raises ValueError for a rope type that is not one of a draft's, KeyError for a missing key.
    """
    # Both do so once more when the config is read: a key beside the block then counts.
    config.standardize_rope_params()  # type: ignore[no-untyped-call]
    rope: Mapping[str, Any] = config.to_dict()["rope_parameters"]
    inv_freq = frequencies(rope, _rotated(config, rope, engine))
    return Angles(inv_freq=inv_freq, concentration=_CONCENTRATIONS[engine](rope))


def _rotated(config: LlamaConfig, rope: Mapping[str, Any], engine: Engine) -> int:
    assert config.head_dim is not None
    # SGLang reads it beside the block.
    share = rope.get("partial_rotary_factor") if engine == "vllm" else config.to_dict().get("partial_rotary_factor")
    return int(config.head_dim * (1.0 if share is None else share))


def _sglang_concentration(rope: Mapping[str, Any]) -> float:
    """``attention_factor`` is not read; ``attn_factor`` comes on top of what it computes itself."""
    if rope["rope_type"] != "yarn":
        return 1.0
    own = mscale(rope)
    if rope.get("mscale") is not None and rope.get("mscale_all_dim") is not None:
        own = mscale(rope, rope["mscale"]) / mscale(rope, rope["mscale_all_dim"])
    return own * float(rope.get("attn_factor", 1.0))


_CONCENTRATIONS: Mapping[Engine, Callable[[Mapping[str, Any]], float]] = {
    "vllm": concentration,
    "sglang": _sglang_concentration,
}
