"""The forms an exported draft can have, which engine serves which, and how one is read back.

eagle3         the checkpoint of vLLM and SGLang (``contract``); of EAGLE-1, which goes by the same option, the
               two engines want different ones: SGLang builds ``fc`` with a bias, which vLLM refuses to load
speculators    the format of the speculators library, for vLLM, EAGLE-3 only
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ExportError
from .eagle3.checkpoint import ARCHITECTURE, engine_config, layer_config, vocabulary_shapes, weight_shapes
from .spec import DraftSpec

Format = Literal["eagle3", "speculators"]
Engine = Literal["vllm", "sglang"]

ENGINES: tuple[Engine, ...] = ("vllm", "sglang")
EAGLE1_ARCHITECTURES: Mapping[Engine, str] = {"vllm": "EagleLlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}
_SPECULATORS_VERSION = "0.3.0"
"""Of the library whose layout is written; vLLM does not look at it."""
_SPECULATIVE_TOKENS = 3
"""Drafted a step where a server is given nothing but the directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a draft is written."""

    format: Format = "eagle3"
    engines: tuple[Engine, ...] = ENGINES
    """Those that must be able to serve it."""
    target: str | None = None
    """Name or directory of the target, for the speculators format, which can name it."""


def refusal(spec: DraftSpec, chosen: Format, engine: Engine) -> str | None:
    """Return why an engine cannot serve a draft and what to do, or None if it can."""
    if chosen == "speculators":
        if spec.method == "eagle1":
            return "the speculators format has no EAGLE-1 that it reads; choose --format eagle3"
        return None if engine == "vllm" else "it does not read the speculators format; choose --format eagle3"
    if engine == "vllm":
        return None
    reasons = (
        (spec.norm_before_fc, "it has no norm_before_fc; train with fc_norm instead"),
        (spec.norm_before_residual, "it has no norm_before_residual; train without"),
        (spec.trained_embeddings, "it overwrites the draft's embeddings; train without train_embeddings"),
        (len(spec.boundaries) == 1, "it leaves out fc with a single boundary; train with two or more"),
    )
    return next((reason for is_so, reason in reasons if is_so), None)


def require_servable(spec: DraftSpec, chosen: Format, engines: tuple[Engine, ...], where: str) -> tuple[Engine, ...]:
    """Return which of ``engines`` can serve the draft; raise ExportError if one asked for alone, or all, cannot."""
    refusals = {engine: refusal(spec, chosen, engine) for engine in engines}
    able = tuple(engine for engine, reason in refusals.items() if reason is None)
    if not able:
        reasons = "; ".join(f"{engine}: {reason}" for engine, reason in refusals.items())
        raise ExportError(f"{where}: this draft cannot be served by {reasons}.")
    # One directory cannot be both.
    return able[:1] if spec.method == "eagle1" else able


def form_config(spec: DraftSpec, dtype: str, form: Form) -> dict[str, Any]:
    """Return ``config.json`` for weights of ``dtype``."""
    if spec.method == "eagle1":
        return layer_config(spec) | {"architectures": [EAGLE1_ARCHITECTURES[form.engines[0]]], "dtype": dtype}
    if form.format == "eagle3":
        return engine_config(spec, dtype)
    # vLLM passes the layer's config on as a whole, and of the rest only what it knows; it would take three
    # auxiliary states where their number is missing, and norm_before_residual as true.
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "draft_vocab_size": spec.draft_vocab_size,
        "target_hidden_size": spec.hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(spec.boundaries),
        "norm_before_residual": spec.norm_before_residual,
        "norm_before_fc": spec.norm_before_fc,
        "fc_norm": spec.fc_norm,
        "norm_output": spec.norm_output,
        "embed_requires_grad": spec.trained_embeddings,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "transformer_layer_config": layer_config(spec)
        | {"num_aux_hidden_states": len(spec.boundaries), "dtype": dtype},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": _SPECULATIVE_TOKENS}],
            "verifier": {"name_or_path": form.target, "architectures": [spec.target_architecture]},
        },
    }


def tensor_shapes(spec: DraftSpec, form: Form) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor, as written."""
    shapes = {written_name(name, form): shape for name, shape in weight_shapes(spec).items()}
    if needs_bias(spec, form):
        shapes["fc.bias"] = (spec.hidden_size,)
    return shapes | vocabulary_shapes(spec)


def needs_bias(spec: DraftSpec, form: Form) -> bool:
    """Return whether a bias of zeros is written with ``fc``: SGLang would leave its own at random."""
    return spec.method == "eagle1" and form.engines == ("sglang",)


def written_name(name: str, form: Form) -> str:
    """Return what a trained tensor is called in the file."""
    return name.replace("midlayer.", "layers.0.") if form.format == "speculators" else name


def trained_name(name: str, config: Mapping[str, Any]) -> str:
    """Return what a tensor of the file is called in training."""
    return name.replace("layers.0.", "midlayer.") if "speculators_config" in config else name


def is_draft(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is that of a draft of any form."""
    names = (ARCHITECTURE, *EAGLE1_ARCHITECTURES.values())
    return "speculators_config" in config or any(name in names for name in config.get("architectures") or [])


def vllm_method(config: Mapping[str, Any]) -> str:
    """Return what vLLM calls the method of a draft."""
    is_eagle1 = any(name in EAGLE1_ARCHITECTURES.values() for name in config.get("architectures") or [])
    return "eagle" if is_eagle1 else "eagle3"


def spec_of(config: Mapping[str, Any], *, trained_embeddings: bool) -> DraftSpec:
    """Return the draft that a ``config.json`` describes, but for what it does not say of the target.

    Raises KeyError for a missing key.
    """
    layer = config.get("transformer_layer_config", config)
    shape = {key: layer[key] for key in DraftSpec.model_fields if key in layer}
    # The target is not looked at by who reads a draft back.
    shape |= {"target_architecture": "", "num_target_layers": 0, "trained_embeddings": trained_embeddings}
    if vllm_method(config) == "eagle":
        plain = {"method": "eagle1", "boundaries": (), "norm_output": False, "fc_norm": False}
        return DraftSpec(**shape | plain | {"draft_vocab_size": layer["vocab_size"]})
    switches = {key: config[key] for key in ("draft_vocab_size", "norm_output", "fc_norm", "norm_before_residual")}
    before_fc = config["norm_before_fc"] if "norm_before_fc" in config else config["eagle_config"]["norm_before_fc"]
    boundaries = tuple(config["eagle_aux_hidden_state_layer_ids"])
    return DraftSpec(**shape | switches | {"norm_before_fc": before_fc, "boundaries": boundaries})
