"""The EAGLE-1 checkpoints: one for vLLM or one for SGLang, which builds ``fc`` with a bias that vLLM refuses."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..checkpoint import DraftCheckpoint, Engine, Form, Format, layer_config
from ..spec import DraftSpec
from .spec import Eagle1Spec

ARCHITECTURES: Mapping[Engine, str] = {"vllm": "EagleLlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}


class Eagle1Checkpoint(DraftCheckpoint[Eagle1Spec]):
    """A directory for one engine."""

    constant_names = ("fc.bias",)
    one_directory_serves_all = False

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return any(name in ARCHITECTURES.values() for name in config.get("architectures") or [])

    def served_by(self, config: Mapping[str, Any]) -> tuple[Engine, ...]:
        names = config.get("architectures") or []
        return tuple(engine for engine in self.engines if ARCHITECTURES[engine] in names)

    def vllm_method(self) -> str:
        return "eagle"

    def refusal(self, spec: Eagle1Spec, chosen: Format, engine: Engine) -> str | None:
        if chosen == "speculators":
            return "the speculators format has no EAGLE-1 that it reads; choose --format native"
        return None

    def config(self, spec: Eagle1Spec, dtype: str, form: Form) -> dict[str, Any]:
        return layer_config(spec) | {"architectures": [ARCHITECTURES[form.engines[0]]], "dtype": dtype}

    def constants(self, spec: Eagle1Spec, form: Form) -> dict[str, torch.Tensor]:
        # SGLang would leave a bias of its own at random.
        return {"fc.bias": torch.zeros(spec.hidden_size)} if form.engines == ("sglang",) else {}

    def spec_of(self, config: Mapping[str, Any], tensors: Iterable[str]) -> Eagle1Spec:
        shape = {key: config[key] for key in DraftSpec.model_fields if key in config}
        # The target is not looked at by who reads a draft back.
        return Eagle1Spec(
            **shape,
            target_architecture="",
            num_target_layers=0,
            boundaries=(),
            draft_vocab_size=config["vocab_size"],
        )
