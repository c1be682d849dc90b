"""``specx export``: the servable draft, written only if it is the one that was trained."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...storage.backends.durable import disk_errors, fsync_tree, temporary_name
from ..data.draft_vocabulary import membership, offsets
from ..errors import ExportError
from ..families.checkpoint import (
    CONFIG_FILE,
    ENGINES,
    WEIGHTS_FILE,
    Engine,
    Form,
    Format,
    require_servable,
    vocabulary_shapes,
)
from ..families.registry import family
from ..loop.checkpoint import load_checkpoint
from ..loop.run_directory import RunDirectory
from .config import ExportConfig
from .verify import TrainedDraft, check_draft

_log = logging.getLogger(__name__)

_DRAFT_PREFIX = "draft."

Dtype = Literal["bfloat16", "float32"]
Checkpoint = Literal["best", "last"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What was written."""

    tensors: int
    bytes: int
    engines: list[str]
    """Those that can serve it."""
    checkpoint: Checkpoint
    """Whose weights they are."""


def run(config: ExportConfig) -> ExportSummary:
    """Export the draft that the settings name."""
    return export(
        config.run,
        config.out,
        config.dtype,
        config.checkpoint,
        format=config.format,
        engine=config.engine,
        target=config.target,
    )


def export(
    run: str | Path,
    out: str | Path,
    dtype: Dtype = "bfloat16",
    checkpoint: Checkpoint | None = None,
    *,
    format: Format = "native",  # noqa: A002 - the option's name
    engine: Engine | Literal["both"] = "both",
    target: str | None = None,
) -> ExportSummary:
    """Write the draft of a run's checkpoint for the engines, and check what was written.

    ``checkpoint`` is by default the best, where the run has one, and else the last. With ``engine`` both it
    is written for those that can serve it. Raises TrainError if ``run`` is none, ExportError if ``out`` is
    taken, no engine asked for can serve the draft, or it fails the check; then nothing is left at ``out``.
    """
    directory = RunDirectory(run)
    chosen = checkpoint or ("best" if directory.best_checkpoint.exists() else "last")
    trained = read_trained(directory, chosen)
    spec = trained.spec
    chosen_family = family(spec.method)
    checkpoint_files = chosen_family.checkpoint
    engines = require_servable(checkpoint_files, spec, format, ENGINES if engine == "both" else (engine,), str(run))
    form = Form(format=format, engines=engines, target=target)
    destination = Path(out).absolute()
    if destination.exists():
        raise ExportError(f"{destination}: exists. Choose another --out, or delete it.")
    temporary = temporary_name(destination)
    with disk_errors(destination.parent):
        try:
            write_draft(temporary, trained, dtype, form)
            check_draft(temporary, trained, form)
            fsync_tree(temporary)
            temporary.rename(destination)
        except SafetensorError as error:
            raise ExportError(f"{destination}: the weights cannot be written ({error}). Free some space.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if not engines:
        _log.info("%s: no engine serves a draft of method %s; our own chain does", destination, spec.method)
    for hint in checkpoint_files.serving_hints(spec, engines):
        _log.info(hint)
    return ExportSummary(
        tensors=len(checkpoint_files.tensor_shapes(spec, form, chosen_family.weight_shapes(spec))),
        bytes=sum(file.stat().st_size for file in destination.iterdir()),
        engines=list(engines),
        checkpoint=chosen,
    )


def read_trained(directory: RunDirectory, which: Checkpoint = "last") -> TrainedDraft:
    """Read a run's draft from a checkpoint; the target is not needed."""
    spec = directory.spec()
    checkpoint = load_checkpoint(directory.best_checkpoint if which == "best" else directory.checkpoint)
    state = checkpoint["state_dict"]
    weights = {
        name.removeprefix(_DRAFT_PREFIX): tensor for name, tensor in state.items() if name.startswith(_DRAFT_PREFIX)
    }
    d2t = state["vocabulary.d2t"]
    return TrainedDraft(
        spec=spec,
        weights=weights,
        vocabulary=d2t + torch.arange(len(d2t)),
        rope=checkpoint["rope"],
    )


def write_draft(directory: Path, trained: TrainedDraft, dtype: Dtype, form: Form) -> None:
    """Write config and weights, unchecked."""
    spec, files = trained.spec, family(trained.spec.method).checkpoint
    kind = getattr(torch, dtype)
    tensors = {files.written_name(name, form): tensor.to(kind).contiguous() for name, tensor in trained.weights.items()}
    tensors |= {name: tensor.to(kind) for name, tensor in files.constants(spec, form).items()}
    if vocabulary_shapes(spec):
        ids = trained.vocabulary.numpy()
        tensors["d2t"] = torch.from_numpy(offsets(ids))
        tensors["t2d"] = torch.from_numpy(membership(ids, spec.vocab_size))
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps(files.config(spec, dtype, form), indent=2) + "\n")
    # transformers, and vLLM through it, ask for the framework.
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
