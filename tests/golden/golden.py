"""The golden files, and what is computed from them in the same way each time."""

import csv
import platform
import tarfile
from pathlib import Path
from typing import Any

import torch
import xxhash

from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.data.batch import read_batch
from specx.train.data.datamodule import FeatureData
from specx.train.opening import new_spec, open_corpus, store_records
from specx.train.pipeline import run

ARCHIVE = Path(__file__).parent / "golden.tar.xz"
CURVES = Path(__file__).parent / "curves.json"

CODECS = ("lossless", "zstd", "none", "int8", "fp8")
SETTINGS: dict[str, Any] = {
    "draft_vocab_size": 128,
    "intermediate_size": 32,
    "max_steps": 20,
    "step_tokens": 256,
    "batch_tokens": 256,
    "lr": 3e-3,
    "holdout_fraction": 0.1,
    "validate_every": 10,
    "log_every": 1,
}
"""Of every run."""
RUNS: dict[str, dict[str, Any]] = {
    "eagle3": {"preset": "eagle3", "ttt_steps": 3},
    "specdrift": {"preset": "specdrift"},
    "eagle1": {"preset": "eagle1"},
}


def unpack(folder: Path) -> Path:
    """Unpack the golden files into a folder and return it."""
    with tarfile.open(ARCHIVE) as packed:
        packed.extractall(folder, filter="data")
    return folder


def settings(root: Path, name: str, out: Path) -> TrainConfig:
    """Return the settings of a run over the unpacked files."""
    given = SETTINGS | RUNS[name] | {"store": str(root / "lossless"), "out": str(out)}
    if name == "eagle1":
        del given["draft_vocab_size"]
    return TrainConfig.model_validate(given)


def train(root: Path, name: str, out: Path) -> None:
    """Train one of the runs, on one thread."""
    torch.set_num_threads(1)
    run(settings(root, name, out))


def curve(out: Path) -> list[float]:
    """Return the loss of each step of a run."""
    with (out / "logs" / "csv" / "from_step_0000000" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def batches(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the batches of a run's first epoch: which sequences with which seeds, and a hash of every array."""
    config = settings(root, name, root / "unused").model_copy(update={"max_steps": None, "epochs": 1})
    stores = [FeatureStore.open(config.store[0])]
    spec = new_spec(config, stores[0])
    data = FeatureData(config, open_corpus(stores, store_records(config, stores), spec.boundaries))
    return [
        {
            "step": step,
            "sequences": list(plan.sequences),
            "seeds": list(plan.seeds),
            "arrays": hashes(read_batch(data.corpus, plan, data.lengths)),
        }
        for step in range(1, data.steps + 1)
        for plan in data.step_plans(step)
    ]


def hashes(batch: Any) -> dict[str, str]:
    """Return shape and hash of each array of a batch."""
    found = {}
    for name in ("input_ids", "loss_mask", "documents", "positions", "aux_hidden", "argmax", "lse", "last_hidden"):
        tensor = getattr(batch, name).contiguous()
        plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        found[name] = f"{list(tensor.shape)} {xxhash.xxh128_hexdigest(plain.numpy().tobytes())}"
    return found


def processor() -> dict[str, str]:
    """Return what decides the last bits of a sum: processor and torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    model = " ".join(values.get(name, "?") for name in ("model name", "cpu family", "model", "stepping"))
    return {"processor": model, "torch": torch.__version__}
