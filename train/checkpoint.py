"""A run's checkpoint: written whole, read without trusting it: tensors and plain values only."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from .errors import TrainError
from .run import RunDirectory


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write weights, optimizer and place in the data, atomically."""
    trainer.save_checkpoint(path, weights_only=False)


def load_checkpoint(directory: RunDirectory) -> dict[str, Any]:
    """Return Lightning's checkpoint on the CPU; raise TrainError if there is none or it holds code."""
    path = directory.checkpoint
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
