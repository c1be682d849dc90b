"""Reading a run's checkpoint without trusting it: tensors and plain values only."""

import pickle
from typing import Any

import torch

from .errors import TrainError
from .run import RunDirectory


def load_checkpoint(directory: RunDirectory) -> dict[str, Any]:
    """Return Lightning's checkpoint on the CPU; raise TrainError if there is none or it holds code."""
    path = directory.checkpoint
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainError(f"{path}: no checkpoint yet. Run `specx train` until it has written one.") from error
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TrainError(f"{path}: not a checkpoint of specx: {reason}. Train again with another --out.") from error
    return checkpoint
