"""A run's checkpoint: written whole, read without trusting it: tensors and plain values only."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from ..errors import TrainError


def save_checkpoint(trainer: Trainer, path: Path, *, weights_only: bool = False) -> None:
    """Write weights, optimizer and place in the data, atomically, or the weights alone; every process must call it."""
    trainer.save_checkpoint(path, weights_only=weights_only)


def rewind(checkpoint: dict[str, Any], batches_per_process: int) -> None:
    """Put Lightning's counters to the end of the checkpoint's last whole optimizer step.

    They count batches of a process, so they differ where the run goes on with other devices; and a checkpoint that is
    written because a step went wrong has counted some of that step's.
    """
    if "loops" not in checkpoint:
        return
    steps = checkpoint["global_step"]
    batches = steps * batches_per_process
    loop = checkpoint["loops"]["fit_loop"]
    # As if saved at the end of the batch, before its validation: that is not run again.
    place = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    loop["epoch_loop.batch_progress"] |= {"total": dict(place), "current": dict(place), "is_last_batch": False}
    loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"] = {
        "ready": steps,
        "completed": steps,
    }
    nothing = dict.fromkeys(place, 0)
    loop["epoch_loop.val_loop.batch_progress"] |= {"total": dict(nothing), "current": dict(nothing)}
    loop["state_dict"]["combined_loader"] = [{"next_batch": batches}]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return Lightning's checkpoint on the CPU; raise TrainError if there is none or it holds code."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainError(f"{path}: no checkpoint yet. Run `specx train` until it has written one.") from error
    except (OSError, EOFError, LookupError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"{path}: not a checkpoint of specx: it is damaged, or holds more than tensors and plain values "
            f"({type(error).__name__}). Train again with another --out."
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "rope", "totals"} <= checkpoint.keys():
        raise TrainError(f"{path}: not a checkpoint of specx: other keys. Train again with another --out.")
    return checkpoint
