"""The directory of a run: what belongs to it, and whether a rerun is the same run.

run.json          settings, store and units, to tell a resume from another run
draft.json        what the draft is
vocabulary.npy    (Vd,) int64, target ids of the draft vocabulary
checkpoints/      last.ckpt, and best.ckpt: the weights with the longest acceptance length on the held-out split
logs/             the curves
result.json       the summary, once the run is complete
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ...storage.backends.durable import temporary_name
from ...storage.schema import Record
from ..config import TrainConfig
from ..errors import TrainError
from ..families.load import load_spec
from ..families.spec import DraftSpec, save_spec


class StoreRecord(Record):
    """What a run takes of one store."""

    units: tuple[int, ...]
    """Units at the first start; later ones are not this run's."""
    view_files: tuple[str, ...] = ()
    """Files of the views at the first start, likewise."""


RUN_FORMAT = 2
"""Of runs that are begun now. In format 1 a step had a number of batches, each of rows as long as the longest
sequence, so that such a run has other steps."""


class RunRecord(Record):
    """``run.json``"""

    format: int = 1
    settings: dict[str, Any]
    """The config, without where the run lies and how often it logs."""
    target: dict[str, str]
    """Identity of the stores' target."""
    batches_per_step: int | None = Field(default=None, exclude=True)
    """Of format 1 only."""
    stores: tuple[StoreRecord, ...]


_FREE_SETTINGS = {
    "out",
    "store",
    "cache_bytes",
    "batch_tokens",
    "devices",
    "strategy",
    "checkpoint_every",
    "validate_every",
    "loggers",
    "log_every",
}
"""Those that decide nothing of what a run computes."""


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, written atomically."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The weights that did best on the held-out split; there is none without one."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def is_begun(self) -> bool:
        return (self.path / "run.json").exists()

    def begin(self, record: RunRecord, spec: DraftSpec, vocabulary: npt.NDArray[np.int64]) -> None:
        """Write what the run is; ``run.json`` comes last and makes it one."""
        is_taken = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if is_taken and not (self.path / "draft.json").exists():
            raise TrainError(f"{self.path}: not empty and not a run. Choose another --out.")
        self.path.mkdir(parents=True, exist_ok=True)
        save_spec(spec, self.path / "draft.json")
        np.save(self.path / "vocabulary.npy", vocabulary)
        self._write("run.json", record.model_dump(mode="json"))

    def record(self) -> RunRecord:
        """Return what the run is."""
        path = self.path / "run.json"
        try:
            record = RunRecord.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise TrainError(f"{path}: not readable ({error}). Use another --out.") from error
        if record.format > RUN_FORMAT:
            raise TrainError(
                f"{path}: of format {record.format}, and this version of specx knows those up to {RUN_FORMAT}. "
                "Upgrade specx, or use another --out."
            )
        return record

    def spec(self) -> DraftSpec:
        """Return what the draft is; raise TrainError if this is no run."""
        return load_spec(self.path / "draft.json")

    def vocabulary(self) -> npt.NDArray[np.int64]:
        """Return the draft vocabulary (Vd,)."""
        ids: npt.NDArray[np.int64] = np.load(self.path / "vocabulary.npy", allow_pickle=False)
        return ids

    def require_same(self, config: TrainConfig, target: dict[str, str]) -> None:
        """Raise TrainError, naming what differs, if the run here is another one."""
        record = self.record()
        settings = run_settings(config)
        if len(config.store) != len(record.stores):
            raise TrainError(
                f"{self.path}: this run was begun with {len(record.stores)} stores, now there are {len(config.store)}. "
                "Use another --out, or the stores it was begun with, in their order."
            )
        if record.target != target:
            raise TrainError(f"{self.path}: this run was begun on a store of another target. Use another --out.")
        for key, found in record.settings.items():
            if found != settings.get(key, found):
                raise TrainError(
                    f"{self.path}: this run was begun with {key} = {found}, now it is {settings[key]}. "
                    "Use another --out, or the settings it was begun with."
                )

    def require_resumable(self) -> None:
        """Raise TrainError if the run was begun by a version whose steps were others."""
        if self.record().format < RUN_FORMAT:
            raise TrainError(
                f"{self.path}: begun by an earlier version of specx, which packed batches in another way, so it cannot "
                "be resumed. Export it (`specx export`, with --checkpoint last or best), or use another --out."
            )

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary of a complete run."""
        self._write("result.json", summary)

    def _write(self, name: str, values: dict[str, Any]) -> None:
        temporary = temporary_name(self.path / name)
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        temporary.rename(self.path / name)


def run_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what a run computes."""
    return {key: value for key, value in config.flat().items() if key not in _FREE_SETTINGS}
