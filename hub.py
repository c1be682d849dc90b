"""Targets by name: a local directory, or a model on the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from . import SpecxError

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Patterns of what describes a target: config, tokenizer and chat template."""


class TargetError(SpecxError):
    """The target cannot be used."""


def locate_target(name: str | Path, *, weights: bool) -> Path:
    """Return the directory of a target, given as a local directory or as a hub id such as ``openai/gpt-oss-120b``.

    From the hub only config and tokenizer are fetched, unless ``weights`` are needed too; what is cached is not
    fetched again. Raises TargetError if it is neither.
    """
    name = str(name)
    path = Path(name)
    if path.is_dir():
        return path.absolute()
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if path.exists() or not is_hub_id:
        raise TargetError(f"{name}: no such directory. Give --target a model's directory or hub id.")
    patterns = [*CONFIG_FILES, *(("*.safetensors", "*.json") if weights else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TargetError(f"{name}: neither a directory nor a model on the hub: {reason}") from error
