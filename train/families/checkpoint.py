"""The files of an exported draft: what every family's has, and what each family says of its own.

native         the layout that engines load by themselves
speculators    the format of the speculators library, for vLLM

Shapes: V target vocabulary, Vd draft vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch

from ..errors import ExportError
from .spec import DraftSpec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

Format = Literal["native", "speculators"]
Engine = Literal["vllm", "sglang"]

ENGINES: tuple[Engine, ...] = ("vllm", "sglang")

SpecT = TypeVar("SpecT", bound=DraftSpec)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a draft is written."""

    format: Format = "native"
    engines: tuple[Engine, ...] = ENGINES
    """Those that must be able to serve it."""
    target: str | None = None
    """Name or directory of the target, for the speculators format, which can name it."""


class DraftCheckpoint(ABC, Generic[SpecT]):
    """How a family's drafts are written, recognized and read back."""

    engines: tuple[Engine, ...] = ENGINES
    """Engines that serve drafts of this family at all."""
    constant_names: tuple[str, ...] = ()
    """Tensors that some form has beside the trained ones."""
    one_directory_serves_all = True
    """Whether every engine reads the same files; if not, they are written for one."""

    @abstractmethod
    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` is that of a draft of this family."""

    @abstractmethod
    def refusal(self, spec: SpecT, chosen: Format, engine: Engine) -> str | None:
        """Return why an engine cannot serve a draft and what to do, or None if it can."""

    @abstractmethod
    def config(self, spec: SpecT, dtype: str, form: Form) -> dict[str, Any]:
        """Return ``config.json`` for weights of ``dtype``."""

    @abstractmethod
    def spec_of(self, config: Mapping[str, Any], tensors: Iterable[str]) -> SpecT:
        """Return the draft that a ``config.json`` and the names of its tensors, as trained, describe.

        What they do not say of the target is empty. Raises KeyError or ValueError for a config that lacks a key.
        """

    def constants(self, spec: SpecT, form: Form) -> dict[str, torch.Tensor]:
        """Return the tensors that a form has beside the trained ones, of ``constant_names``."""
        return {}

    def written_name(self, name: str, form: Form) -> str:
        """Return what a trained tensor is called in the file."""
        return name

    def trained_name(self, name: str, config: Mapping[str, Any]) -> str:
        """Return what a tensor of the file is called in training."""
        return name

    def tensor_shapes(
        self, spec: SpecT, form: Form, trained: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor as written, given those of the trained ones."""
        shapes = {self.written_name(name, form): shape for name, shape in trained.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.constants(spec, form).items()}
        return shapes | vocabulary_shapes(spec)

    def serving_hints(self, spec: SpecT, engines: tuple[Engine, ...]) -> list[str]:
        """Return what a user has to give an engine beside the directory."""
        return []

    def served_by(self, config: Mapping[str, Any]) -> tuple[Engine, ...]:
        """Return the engines that load a directory with this ``config.json``."""
        return ()

    def vllm_method(self) -> str | None:
        """Return what vLLM calls the method; None if it has none."""
        return None


def layer_config(spec: DraftSpec) -> dict[str, Any]:
    """Return what the config of any Llama layer has, whatever the form of the checkpoint."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": spec.rope_parameters,
    }
    if "partial_rotary_factor" in spec.rope_parameters:
        # vLLM reads it in the rope block, SGLang here.
        config["partial_rotary_factor"] = spec.rope_parameters["partial_rotary_factor"]
    return config


def layer_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a ``config.json`` that describes the layer: all of it but in the speculators format."""
    layer: Mapping[str, Any] = config.get("transformer_layer_config", config)
    return layer


def vocabulary_shapes(spec: DraftSpec) -> dict[str, tuple[int, ...]]:
    """Return ``d2t`` (Vd,) int64 and ``t2d`` (V,) bool; none where the draft has the full vocabulary."""
    if spec.draft_vocab_size == spec.vocab_size:
        return {}
    return {"d2t": (spec.draft_vocab_size,), "t2d": (spec.vocab_size,)}


def require_servable(
    checkpoint: DraftCheckpoint[SpecT], spec: SpecT, chosen: Format, engines: tuple[Engine, ...], where: str
) -> tuple[Engine, ...]:
    """Return which of ``engines`` can serve the draft; raise ExportError if one asked for alone, or all, cannot.

    Of a family that no engine serves, the draft is for our own chain: none is returned where all are asked for.
    """
    if engines == ENGINES and not checkpoint.engines:
        return ()
    refusals = {engine: checkpoint.refusal(spec, chosen, engine) for engine in engines}
    able = tuple(engine for engine, reason in refusals.items() if reason is None)
    if not able:
        reasons = "; ".join(f"{engine}: {reason}" for engine, reason in refusals.items())
        raise ExportError(f"{where}: this draft cannot be served by {reasons}.")
    return able if checkpoint.one_directory_serves_all else able[:1]
