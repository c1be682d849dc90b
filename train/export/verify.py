"""Refusing an exported draft that would not be served as it was trained.

Reads the files as an engine would, and compares them with the run.

Shapes: Vd draft vocabulary, D head dimension.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import ExportError
from ..families.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Form, layer_of, vocabulary_shapes
from ..families.registry import family
from ..families.spec import DraftSpec
from ..rope.rotary import RotaryEmbedding

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# The engines use different keys for the first, compute the same number without it, and
# one of them lets the second override the rope block.
_FORBIDDEN_KEYS = ("attention_factor", "mscale", "mscale_all_dim")
_FORBIDDEN_TOP_KEYS = ("original_max_position_embeddings", "rope_scaling", "rope_theta", "layer_types")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedDraft:
    """A draft as the run left it."""

    spec: DraftSpec
    weights: dict[str, torch.Tensor]
    """By the names of the checkpoint, as trained."""
    vocabulary: torch.Tensor
    """(Vd,) int64, target ids"""
    rope: dict[str, Any]
    """Angles trained with: ``inv_freq`` (D/2,) float32 and ``attention_scaling``; empty without rotary embedding."""


def check_draft(directory: Path, trained: TrainedDraft, form: Form) -> None:
    """Raise ExportError, naming the first thing that is wrong, unless the files are the trained draft."""
    config = _config(directory / CONFIG_FILE)
    _check_config(directory / CONFIG_FILE, config, trained.spec, form)
    if trained.rope:
        _check_rope(directory / CONFIG_FILE, layer_of(config), trained)
    _check_tensors(directory / WEIGHTS_FILE, _DTYPES[config["dtype"]], trained, form)


def _config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: not readable ({error})") from error
    return config


def _check_config(path: Path, config: dict[str, Any], spec: DraftSpec, form: Form) -> None:
    if config.get("dtype") not in _DTYPES:
        raise ExportError(f"{path}: dtype is {config.get('dtype')}, expected one of {', '.join(_DTYPES)}")
    found, expected = (
        dict(_flat(config)),
        dict(_flat(family(spec.method).checkpoint.config(spec, config["dtype"], form))),
    )
    for key, value in expected.items():
        if key not in found:
            raise ExportError(f"{path}: {key} is missing, expected {value}")
        if found[key] != value:
            raise ExportError(f"{path}: {key} is {found[key]}, the draft was trained with {value}")
    for key in sorted(set(found) - set(expected)):
        reason = ": an engine reads it against the rope block" if key in _FORBIDDEN_TOP_KEYS else ""
        raise ExportError(f"{path}: unexpected key {key}{reason}")
    _check_layer_ids(path, spec)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the config's values by their dotted names."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_layer_ids(path: Path, spec: DraftSpec) -> None:
    layers = list(spec.boundaries)
    if layers != sorted(set(layers)) or not all(1 <= layer < spec.num_target_layers for layer in layers):
        raise ExportError(f"{path}: layer ids {layers}, expected ascending ids from 1 to {spec.num_target_layers - 1}")


def _check_rope(path: Path, config: Mapping[str, Any], trained: TrainedDraft) -> None:
    rope = config["rope_parameters"]
    for key in _FORBIDDEN_KEYS:
        if key in rope:
            raise ExportError(f"{path}: rope_parameters.{key} is read by one engine only; leave it out")
    if rope.get("rope_type") == "yarn" and "truncate" not in rope:
        raise ExportError(f"{path}: rope_parameters.truncate is missing, which engines read as true")
    served = RotaryEmbedding(config["head_dim"], rope)
    inv_freq, attention_scaling = trained.rope["inv_freq"], trained.rope["attention_scaling"]
    scaling_differs = float(served.attention_scaling) != attention_scaling
    if not torch.equal(served.inv_freq, inv_freq) or scaling_differs:
        last = config["max_position_embeddings"] - 1
        error = float((served.inv_freq - inv_freq).abs().max()) * last
        raise ExportError(
            f"{path}: rope_parameters give angles up to {error:.3g} rad from those trained with at position {last}, "
            f"and a concentration of {served.attention_scaling:.6f} against {attention_scaling:.6f}"
        )


def _check_tensors(path: Path, dtype: torch.dtype, trained: TrainedDraft, form: Form) -> None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: not readable ({error})") from error
    spec, chosen = trained.spec, family(trained.spec.method)
    files = chosen.checkpoint
    weights = {files.written_name(name, form): weight for name, weight in trained.weights.items()}
    weights |= files.constants(spec, form)
    expected, vocabulary = files.tensor_shapes(spec, form, chosen.weight_shapes(spec)), vocabulary_shapes(spec)
    if missing := sorted(set(expected) - set(tensors)):
        raise ExportError(f"{path}: tensor {missing[0]} is missing; engines would serve it untrained, in silence")
    if unexpected := sorted(set(tensors) - set(expected)):
        raise ExportError(f"{path}: unexpected tensor {unexpected[0]}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ExportError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    for name in weights:
        if tensors[name].dtype != dtype:
            raise ExportError(f"{path}: {name} is {tensors[name].dtype}, the config says {dtype}")
        if not tensors[name].isfinite().all():
            raise ExportError(f"{path}: {name} has values that are not finite; look at the loss of the run")
        if not torch.equal(tensors[name], weights[name].to(dtype)):
            raise ExportError(f"{path}: {name} differs from the run's; the order of its inputs may have changed")
    if vocabulary:
        _check_vocabulary(path, tensors["d2t"], tensors["t2d"], trained.vocabulary)


def _check_vocabulary(path: Path, d2t: torch.Tensor, t2d: torch.Tensor, vocabulary: torch.Tensor) -> None:
    if d2t.dtype != torch.int64 or t2d.dtype != torch.bool:
        raise ExportError(f"{path}: d2t is {d2t.dtype} and t2d {t2d.dtype}, expected int64 and bool")
    if not torch.equal(d2t + torch.arange(len(d2t)), vocabulary):
        raise ExportError(f"{path}: draft id + d2t is not the run's vocabulary; d2t must hold offsets, not ids")
    if not torch.equal(t2d.nonzero().flatten(), vocabulary):
        raise ExportError(f"{path}: t2d does not mark the tokens that d2t reaches")
