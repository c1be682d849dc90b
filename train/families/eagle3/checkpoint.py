"""The EAGLE-3 checkpoint that vLLM and SGLang load: its config, its tensors' names, and who serves which draft.

Neither engine reports a missing tensor, and each reads the layer ids from another key with another meaning; so what
is written, and what ``export.verify`` demands, is here once.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint import DraftCheckpoint, Engine, Form, Format, layer_config, layer_of
from ..spec import DraftSpec
from .spec import Eagle3Spec

ARCHITECTURE = "LlamaForCausalLMEagle3"
"""The only name that both engines take for this layout."""

_SPECULATORS_VERSION = "0.3.0"
"""Of the library whose layout is written; vLLM does not look at it."""
_SPECULATIVE_TOKENS = 3
"""Drafted a step where a server is given nothing but the directory."""


class Eagle3Checkpoint(DraftCheckpoint[Eagle3Spec]):
    """One directory for both engines, or one of the speculators library for vLLM."""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        is_native = ARCHITECTURE in (config.get("architectures") or [])
        return is_native or config.get("speculators_model_type") == "eagle3"

    def served_by(self, config: Mapping[str, Any]) -> tuple[Engine, ...]:
        return ("vllm",) if "transformer_layer_config" in config else self.engines

    def vllm_method(self) -> str:
        return "eagle3"

    def refusal(self, spec: Eagle3Spec, chosen: Format, engine: Engine) -> str | None:
        if engine == "vllm":
            return None
        if chosen == "speculators":
            return "it does not read the speculators format; choose --format native"
        reasons = (
            (spec.norm_before_fc, "it has no norm_before_fc; train with fc_norm instead"),
            (spec.norm_before_residual, "it has no norm_before_residual; train without"),
            (spec.trained_embeddings, "it overwrites the draft's embeddings; train without train_embeddings"),
            (len(spec.boundaries) == 1, "it leaves out fc with a single boundary; train with two or more"),
        )
        return next((reason for is_so, reason in reasons if is_so), None)

    def serving_hints(self, spec: Eagle3Spec, engines: tuple[Engine, ...]) -> list[str]:
        if spec.sliding_window is None or "sglang" not in engines:
            return []
        option = f"--speculative-draft-window-size {spec.sliding_window - 1}"
        return [f"SGLang takes the draft's window by an option: {option}"]

    def config(self, spec: Eagle3Spec, dtype: str, form: Form) -> dict[str, Any]:
        return _native_config(spec, dtype) if form.format == "native" else _speculators_config(spec, dtype, form)

    def written_name(self, name: str, form: Form) -> str:
        return name.replace("midlayer.", "layers.0.") if form.format == "speculators" else name

    def trained_name(self, name: str, config: Mapping[str, Any]) -> str:
        return name.replace("layers.0.", "midlayer.") if "speculators_config" in config else name

    def spec_of(self, config: Mapping[str, Any], tensors: Iterable[str]) -> Eagle3Spec:
        layer = layer_of(config)
        shape = {key: layer[key] for key in DraftSpec.model_fields if key in layer}
        switches = {key: config[key] for key in ("draft_vocab_size", "norm_output", "fc_norm", "norm_before_residual")}
        before_fc = config["norm_before_fc"] if "norm_before_fc" in config else config["eagle_config"]["norm_before_fc"]
        return Eagle3Spec(
            **shape | switches,
            # The target is not looked at by who reads a draft back.
            target_architecture="",
            num_target_layers=0,
            norm_before_fc=before_fc,
            boundaries=tuple(config["eagle_aux_hidden_state_layer_ids"]),
            sliding_window=layer.get("sliding_window"),
            trained_embeddings="embed_tokens.weight" in tensors,
        )


def _native_config(spec: Eagle3Spec, dtype: str) -> dict[str, Any]:
    """Return the config that both engines read.

    A boundary b is vLLM's layer id b (input of block b, top-level list) and SGLang's b - 1 (output of
    block b - 1, nested list). The rope block is complete: an omitted ``truncate`` means true to both.
    """
    return _layer_config(spec) | {
        "architectures": [ARCHITECTURE],
        "target_hidden_size": spec.hidden_size,
        "draft_vocab_size": spec.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(spec.boundaries),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [boundary - 1 for boundary in spec.boundaries],
            "use_aux_hidden_state": True,
            "norm_before_fc": spec.norm_before_fc,
        },
        "num_aux_hidden_states": len(spec.boundaries),
        "fc_norm": spec.fc_norm,
        "norm_output": spec.norm_output,
        "norm_before_residual": spec.norm_before_residual,
        "dtype": dtype,
    }


def _speculators_config(spec: Eagle3Spec, dtype: str, form: Form) -> dict[str, Any]:
    """Return the config of the speculators library.

    vLLM passes the layer's config on as a whole, and of the rest only what it knows; it would take three auxiliary
    states where their number is missing, and norm_before_residual as true.
    """
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
        "transformer_layer_config": _layer_config(spec)
        | {"num_aux_hidden_states": len(spec.boundaries), "dtype": dtype},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": _SPECULATIVE_TOKENS}],
            "verifier": {"name_or_path": form.target, "architectures": [spec.target_architecture]},
        },
    }


def _layer_config(spec: Eagle3Spec) -> dict[str, Any]:
    config = layer_config(spec)
    if spec.sliding_window is not None:
        config |= {"layer_types": ["sliding_attention"], "sliding_window": spec.sliding_window}
    return config
