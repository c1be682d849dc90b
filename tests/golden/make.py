"""Make the golden files: what one version wrote, which every later one must read.

``stores`` makes a small target and a store of it in each codec, runs of 20 steps, their exports, an offline estimate
and a dry run. They were made by commit 6409e4a and must not be remade: they represent data that users have.
``curves`` writes down what training computes from them now: the batches of an epoch and the loss of each step. They
are made again where a change of batches or steps is meant.

    OMP_NUM_THREADS=1 python -m specx.tests.golden.make stores|curves
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from specx.tests.golden.golden import ARCHIVE, CODECS, CURVES, RUNS, batches, curve, processor, train, unpack

TARGET = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 16,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 128,
        "truncate": False,
    },
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def make_target(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**TARGET), dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(directory)


def make_rows(path: Path) -> None:
    """Write 40 sequences of 8 to 64 tokens, prompt and answer, of two categories."""
    random = np.random.default_rng(0)
    lengths = random.integers(8, 65, 40).tolist()
    table = {
        "input_ids": [random.integers(3, 256, length).tolist() for length in lengths],
        "loss_mask": [[0] * (length // 3) + [1] * (length - length // 3) for length in lengths],
        "category": [("chat", "story")[number % 2] for number in range(len(lengths))],
    }
    pq.write_table(pa.table(table), path)


def specx(*arguments: str | Path) -> str:
    command = [sys.executable, "-c", "from specx.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def last_line(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text.splitlines()[-1])
    return values


def make_stores(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_target(root / "target")
        make_rows(root / "rows.parquet")
        for codec in CODECS:
            specx(
                "extract", "--target", root / "target", "--data", root / "rows.parquet", "--store", root / codec,
                "--codec", codec, "--top-k", "16", "--view", "all", *(["--no-last-hidden"] if codec == "fp8" else []),
            )  # fmt: skip
        results: dict[str, Any] = {}
        for name in RUNS:
            train(root, name, root / f"run-{name}")
            formats = ["eagle3"] if name == "eagle1" else ["eagle3", "speculators"]
            for form in formats:
                specx("export", "--run", root / f"run-{name}", "--out", root / f"draft-{name}-{form}", "--format", form)
        estimate = ["evaluate", "--draft", root / "draft-specdrift-eagle3", "--store", root / "lossless", "--json"]
        results["estimate"] = last_line(specx(*estimate, "--split", "all"))
        dry_run = ["train", "--store", root / "lossless", "--out", root / "none-such", "--preset", "specdrift"]
        results["dry_run"] = last_line(specx(*dry_run, "--dry-run", "--json"))
        (root / "results.json").write_text(json.dumps(results, indent=1))
        (root / "processor.json").write_text(json.dumps(processor()))
        with tarfile.open(archive, "w:xz") as packed:
            for path in sorted(root.iterdir()):
                if path.name != "target":
                    packed.add(path, path.name)


def make_curves(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(Path(folder))
        found: dict[str, Any] = {"processor": processor(), "batches": {}, "losses": {}, "exports": {}}
        for name in RUNS:
            found["batches"][name] = batches(root, name)
            train(root, name, root / "new" / name)
            found["losses"][name] = curve(root / "new" / name)
            specx("export", "--run", root / "new" / name, "--out", root / "new" / f"draft-{name}")
            weights = (root / "new" / f"draft-{name}" / "model.safetensors").read_bytes()
            found["exports"][name] = xxhash.xxh128_hexdigest(weights)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["stores"]:
        make_stores(ARCHIVE)
    elif sys.argv[1:] == ["curves"]:
        make_curves(CURVES)
    else:
        sys.exit(__doc__)
