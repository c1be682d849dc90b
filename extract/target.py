"""The target's files: what it is, its identity, and its head, read without building the model.

Shapes: V vocabulary, H hidden size.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from ..hub import CONFIG_FILES, TargetError, locate_target
from ..storage.errors import StoreError
from ..storage.schema import TargetIdentity
from ..storage.store import FeatureStore

ARCHITECTURES = (
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Targets whose blocks, final norm and head lie where this package expects them."""

_HEAD_TENSORS = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names in safetensors and in configs."""

# They name files, tools and habits of generation, not the function the weights compute.
_KEYS_WITHOUT_MEANING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")

_KEYS_OF_DRAFTS = (
    "head_dim",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
)
"""Those of a config that a draft is made by, and ``open_target`` does not ask for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A target on disk."""

    path: Path
    config: dict[str, Any]
    """Its config.json."""
    files: dict[str, Path]
    """Tensor name -> the safetensors file that holds it."""
    dtype: str
    """Type of the checkpoint: ``float32``, ``bfloat16`` or ``float16``."""

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens."""
        return int(self.config["max_position_embeddings"])


def open_target(name: str, *, weights: bool = True) -> Target:
    """Find the target and check that this package can use it; raise TargetError if not.

    Without ``weights`` its config is all that must be there and no tensor is fetched: ``files`` is empty,
    and ``dtype`` is the one the config names, bfloat16 where it names none.
    """
    path = locate_target(name, weights=weights)
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text())
    except FileNotFoundError as error:
        raise TargetError(f"{path}: config.json is missing. Give --target the directory of a model.") from error
    except ValueError as error:
        raise TargetError(f"{config_path}: not JSON: {error}. Download the model again.") from error
    if not isinstance(config, dict):
        raise TargetError(f"{config_path}: expected an object, found a {type(config).__name__}. Download it again.")
    architectures = config.get("architectures") or ["none"]
    if architectures[0] not in ARCHITECTURES:
        raise TargetError(
            f"{config_path}: unknown architecture {architectures[0]}, expected one of {', '.join(ARCHITECTURES)}."
        )
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(key), int):
            raise TargetError(f"{config_path}: {key} is {config.get(key)!r}, expected an integer.")
    files = _tensor_files(path) if weights else {}
    return Target(
        path=path,
        config=config,
        files=files,
        dtype=_checkpoint_dtype(path, config, files) if weights else _named_dtype(config) or "bfloat16",
    )


def resolve_boundaries(target: Target, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the boundaries to keep; raise TargetError if one is not the input of a block but the first.

    The default is EAGLE-3's low, middle and high: 2, L/2 and L - 3 of L blocks (arXiv 2503.01840, as
    its implementation chose them), or 1, L/2 and L - 1 of a target too small for these.
    """
    layers = target.num_layers
    if wanted is None:
        chosen = {2, layers // 2, layers - 3} if layers >= 8 else {1, layers // 2, layers - 1}
        wanted = tuple(sorted(chosen & set(range(1, layers)))) or (1,)
    for boundary in wanted:
        if not 1 <= boundary < layers:
            reason = "boundary 0 is the embedding, which the draft has" if boundary == 0 else "it has no such block"
            raise TargetError(
                f"{target.path}: boundary {boundary} of {layers} blocks, expected 1 to {layers - 1}: {reason}."
            )
    return wanted


def identify(target: Target) -> TargetIdentity:
    """Hash the config and every tensor, reading each once; shards and file names do not matter."""
    config = {key: value for key, value in target.config.items() if key not in _KEYS_WITHOUT_MEANING}
    config_hash = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    with ThreadPoolExecutor(max_workers=8) as pool:
        by_file = pool.map(_tensor_hashes, sorted(set(target.files.values())))
        lines = sorted(line for lines in by_file for line in lines)
    weights_hash = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return TargetIdentity(architecture=target.architecture, config_hash=config_hash, weights_hash=weights_hash)


def read_head(target: Target) -> dict[str, torch.Tensor]:
    """Return ``embed_tokens`` (V, H), ``norm`` (H,) and ``lm_head`` (V, H) in the checkpoint's dtype."""
    head: dict[str, torch.Tensor] = {}
    for name, tensor_name in _HEAD_TENSORS.items():
        if name == "lm_head" and target.config.get("tie_word_embeddings"):
            head[name] = head["embed_tokens"].clone()
            continue
        file = target.files.get(tensor_name)
        if file is None:
            raise TargetError(f"{target.path}: no tensor {tensor_name}. Is this a whole {target.architecture}?")
        with _opened(file) as tensors:
            head[name] = tensors.get_tensor(tensor_name)
    return head


def copy_into(target: Target, store: FeatureStore) -> None:
    """Give the store what training needs of the target: config, tokenizer, head. Done once.

    A config that leaves to transformers what a draft takes from it, as those from before transformers 5 do with the
    rope, is completed: training reads it without. Raises TargetError if it cannot be.
    """
    if store.has_target:
        return
    config = _completed_config(target)
    with store.new_target() as directory:
        for pattern in CONFIG_FILES:
            for file in sorted(target.path.glob(pattern)):
                shutil.copyfile(file, directory / file.name)
        if any(target.config.get(key) != config.get(key) for key in _KEYS_OF_DRAFTS):
            (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        head = read_head(target)
        try:
            save_file(head, directory / "head.safetensors")
        except SafetensorError as error:
            raise StoreError(
                f"{store.root}: the target's head cannot be written ({error}). "
                "Free some space, or move the store, and rerun the same command."
            ) from error


def _completed_config(target: Target) -> dict[str, Any]:
    try:
        config = AutoConfig.from_pretrained(target.path, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TargetError(f"{target.path / 'config.json'}: transformers cannot read it: {reason}") from error
    values: dict[str, Any] = config.to_dict()
    # Where it lay on this machine.
    del values["_name_or_path"]
    return values


def _named_dtype(config: dict[str, Any]) -> Any:
    return config.get("dtype") or config.get("torch_dtype")


def _checkpoint_dtype(path: Path, config: dict[str, Any], files: dict[str, Path]) -> str:
    """Return the type the config names or, as a config may name none, that of the embedding."""
    dtype = _named_dtype(config)
    name = _HEAD_TENSORS["embed_tokens"]
    if dtype is None and name in files:
        with _opened(files[name]) as tensors:
            dtype = _DTYPES.get(tensors.get_slice(name).get_dtype())
    if dtype not in _DTYPES.values():
        raise TargetError(f"{path}: its dtype is {dtype}, expected one of {', '.join(_DTYPES.values())}.")
    return str(dtype)


def _tensor_files(path: Path) -> dict[str, Path]:
    index_path = path / "model.safetensors.index.json"
    if index_path.exists():
        try:
            names = json.loads(index_path.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise TargetError(f"{index_path}: not a safetensors index ({error}). Download it again.") from error
        for name in set(names.values()):
            if Path(name).name != name or not (path / name).is_file():
                raise TargetError(f"{index_path}: names {name!r}, which is not a file of {path}. Download it again.")
        return {tensor: path / name for tensor, name in names.items()}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise TargetError(f"{path}: no *.safetensors. Convert the checkpoint first; pickled weights are never loaded.")
    names = {}
    for file in files:
        with _opened(file) as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    return names


def _tensor_hashes(file: Path) -> list[str]:
    lines = []
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping: iterating it is not offered
            tensor = tensors.get_tensor(name)
            content = tensor.contiguous().flatten().view(torch.uint8).numpy()
            digest = hashlib.sha256(content).hexdigest()
            lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}")
    return lines


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise TargetError(f"{file}: not a readable safetensors file ({error}). Download it again.") from error
