"""The Ray cluster of a run, and the actor that owns one engine on it.

A worker writes its own parts into the one store, which it must see, as it must see
the target, under the name that the driver has for them.
"""

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from .... import SpecxError
from ....storage.schema import DatasetInfo, Reject
from ....storage.store import FeatureStore
from ...config import ExtractConfig
from ...data.samples import Sample
from ...target import Target, open_target
from ..base import EngineError, ExtractionEngine
from ..single import open_single_engine
from ..sink import Outcome

_CONNECT_WITHIN_S = 10.0


class ExtractWorker:
    """One engine, in a process of its own. Methods raise SpecxError."""

    def __init__(self, config: ExtractConfig, info: DatasetInfo, threads: int) -> None:
        """``threads`` is this worker's share of a machine's cores."""
        self._config = config
        self._info = info
        self._threads = threads
        self._engine: ExtractionEngine | None = None

    def open(self) -> str:
        """Load the target; return the host and process id, as commit records name a writer."""
        name = f"{socket.gethostname()}:{os.getpid()}"
        try:
            FeatureStore.open(self._config.store).info.require_same(self._info, self._config.store)
            target = open_target(self._config.target)
        except SpecxError as error:
            raise EngineError(
                f"{name}: {error} Every node of the Ray cluster must see the store and the target by these names."
            ) from error
        os.environ["OMP_NUM_THREADS"] = str(self._threads)
        # vLLM on a CPU binds each engine's threads to all cores, the same for every engine.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        torch.set_num_threads(self._threads)
        self._engine = open_single_engine(self._config, target, self._info)
        return name

    def run(self, samples: Sequence[Sample], rejects: Sequence[Reject]) -> Outcome:
        """Run samples; return what became of these and earlier ones meanwhile."""
        assert self._engine is not None
        for reject in rejects:
            self._engine.reject(reject)
        for sample in samples:
            self._engine.add(sample)
        return self._engine.take()

    def finish(self, rejects: Sequence[Reject]) -> Outcome:
        """Commit everything; return what became of the rest. Nothing can be run after it."""
        assert self._engine is not None
        for reject in rejects:
            self._engine.reject(reject)
        self._engine.finish()
        outcome = self._engine.take()
        self.close()
        return outcome

    def close(self) -> None:
        """Drop what is not committed."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where workers run, and what each is given of it."""

    started_here: bool
    """Whether this process started Ray or joined it, and therefore leaves it."""
    config: ExtractConfig
    """Of one worker."""
    cpus: float
    gpus: int
    threads: int

    @property
    def demand(self) -> str:
        """What Ray needs to have free for a worker, as users are told it."""
        return f"Ray starts one where {self.cpus:g} CPU and {self.gpus} GPU are free."

    def start(self, info: DatasetInfo) -> Any:
        """Return the handle of a new worker; it starts when the cluster has room."""
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        remote: Any = ray.remote(ExtractWorker)
        return remote.options(**options).remote(self.config, info, self.threads)

    def leave(self) -> None:
        """Shut Ray down, or part from it, if this run started or joined it."""
        if self.started_here:
            ray.shutdown()


def connect(config: ExtractConfig, target: Target) -> Cluster:
    """Start Ray on this machine or join a cluster; raise EngineError if it lacks what the run asks for.

    A Ray that the process has already is shared.
    """
    started_here = not ray.is_initialized()
    if started_here:
        _initialize(config.ray_address)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cores, all_gpus = resources.get("CPU", 1.0), int(resources.get("GPU", 0))
    # The driver's own machine may have no GPU: what counts is what the cluster has.
    engine = config.engine if config.engine != "auto" else ("vllm" if all_gpus else "transformers")
    device = config.device.partition(":")[0]  # a worker sees no GPU but its own
    gpus = config.tensor_parallel if engine == "vllm" else int(device != "cpu")
    if not all_gpus:
        gpus = 0
    if gpus * config.workers > all_gpus:
        message = f"{config.workers} workers of {gpus} GPUs each, and Ray has {all_gpus} GPUs"
        if config.ray_address is None:
            if started_here:
                ray.shutdown()
            raise EngineError(f"{message}. Lower --workers or --tensor-parallel, or give --ray-address.")
        logging.getLogger(__name__).warning("%s: some begin when the cluster has grown, or never.", message)
    return Cluster(
        started_here=started_here,
        config=_of_worker(config, target, engine, device),
        # Rounded down, or the last worker would find a share missing that is no more than a rounding error.
        cpus=min(1.0, int(1000 * cores / config.workers) / 1000),
        gpus=gpus,
        threads=max(1, int(cores) // config.workers),
    )


def _initialize(address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            # Without this word Ray joins what RAY_ADDRESS names.
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            _require_listener(address)
            ray.init(address=address, **quiet)
    except (RuntimeError, ValueError, OSError, RayError) as error:
        where = f"Ray cluster {address}: cannot be joined" if address else "Ray cannot be started here"
        reason = " ".join(str(error).split())[:200]
        raise EngineError(f"{where}: {reason}. Start one with `ray start --head`, or use --workers 1.") from error


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_WITHIN_S).close()


def _of_worker(config: ExtractConfig, target: Target, engine: str, device: str) -> ExtractConfig:
    """Return the settings of one worker, by names that hold in any directory."""
    changes: dict[str, Any] = {"workers": 1, "ray_address": None, "engine": engine, "device": device}
    if "://" not in config.store:
        changes["store"] = str(Path(config.store).absolute())
    if Path(config.target).is_dir():
        changes["target"] = str(target.path)
    if config.tensor_parallel > 1:
        # In a Ray actor vLLM might choose Ray for its own processes too, and wait for GPUs that this actor holds.
        changes["engine_options"] = {"distributed_executor_backend": "mp", **config.engine_options}
    return config.model_copy(update=changes)
