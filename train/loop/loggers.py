"""Where the curves of a run go."""

import importlib.util

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from ..config import TrainConfig
from ..errors import TrainError
from .run_directory import RunDirectory

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def require_packages(config: TrainConfig) -> None:
    """Raise TrainError if a logger's package is not installed."""
    for name in config.loggers:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise TrainError(f"loggers: {name} needs a package that is not installed. Run `pip install {package}`.")


def make_loggers(config: TrainConfig, directory: RunDirectory, first_step: int) -> list[Logger]:
    """Return Lightning's loggers; ``first_step`` is the step of the checkpoint that the run goes on from."""
    # What a killed run logged behind its last checkpoint is superseded: TensorBoard drops it by ``purge_step``, and
    # with the others each start has a curve of its own.
    return [_make(name, directory, first_step) for name in config.loggers]


def _make(name: str, directory: RunDirectory, first_step: int) -> Logger:
    logs = directory.logs
    if name == "tensorboard":
        return TensorBoardLogger(logs, name="tensorboard", version="", purge_step=first_step or None)
    if name == "csv":
        version = f"from_step_{first_step:07d}"
        return CSVLogger(logs, name="csv", version=version, flush_logs_every_n_steps=1)
    run = f"{directory.path.name} from step {first_step}"
    logs.mkdir(parents=True, exist_ok=True)
    # Whether they report to a server is decided as everywhere, by WANDB_MODE and MLFLOW_TRACKING_URI.
    if name == "wandb":
        return WandbLogger(name=run, save_dir=logs, project="specx")
    return MLFlowLogger(experiment_name="specx", run_name=run, save_dir=str(logs / "mlflow"))
