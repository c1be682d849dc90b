"""How long a draft of the tiny gpt-oss is accepted in vLLM, by the steps it was trained for.

Extracts answers of ``train.parquet``, trains for a few CPU-minutes, keeps the checkpoint now and then, and serves each
in vLLM on ``dev.parquet`` with three drafted tokens, greedily; the last one also at temperature 0.7, in our own loop
over transformers, as vLLM's CPU build cannot.

    python tests/benchmarks/acceptance.py --json
"""

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from specx.tests.program import SPECX

DATA = Path(__file__).parents[1] / "data"
CONFIG = Path(__file__).parents[2] / "docs" / "demo.yaml"


def specx(*arguments: str) -> dict[str, Any]:
    """Run a command; return its JSON."""
    done = subprocess.run([*SPECX, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(store: Path, run: Path, steps: int, every: int, seed: int) -> tuple[dict[str, Any], float]:
    """Train, and keep each checkpoint as a run of its own; return the summary and the CPU-seconds."""
    config = run.with_suffix(".yaml")
    settings = {"checkpoint_every": str(every), "validate_every": str(steps)}
    lines = [line for line in CONFIG.read_text().splitlines() if line.partition(":")[0] not in settings]
    config.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in settings.items())]) + "\n")
    command = ["train", "--store", str(store), "--out", str(run), "--config", str(config)]
    command += ["--max-steps", str(steps), "--seed", str(seed), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([*SPECX, *command], stdout=subprocess.PIPE, text=True)
    last = run / "checkpoints" / "last.ckpt"
    kept, seen = 0, 0.0
    while process.poll() is None:
        time.sleep(0.2)
        if last.exists() and last.stat().st_mtime != seen:
            seen = last.stat().st_mtime
            kept += 1
            keep(run, run.with_name(f"kept-{kept}"))
    stdout, _ = process.communicate()
    assert process.returncode == 0, f"specx train ended with {process.returncode}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(stdout.splitlines()[-1]), seconds


def keep(run: Path, copy: Path) -> None:
    """Copy what an export needs."""
    (copy / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "draft.json", "vocabulary.npy", "checkpoints/last.ckpt"):
        shutil.copy(run / name, copy / name)


def accepted(run: Path, *options: str) -> dict[str, Any]:
    """Export a run's last checkpoint and decode with it."""
    draft = run.with_name(f"{run.name}-draft")
    if not draft.exists():
        specx("export", "--run", str(run), "--out", str(draft), "--checkpoint", "last")
    target, prompts = DATA / "tiny-gpt-oss", DATA / "regen" / "dev.parquet"
    command = ["evaluate", "--draft", str(draft), "--target", str(target), "--data", str(prompts)]
    return specx(*command, *options)


def step_of(run: Path) -> int:
    import torch

    step: int = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1000, help="Answers to train on.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="Steps between the checkpoints that are served.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, run = Path(folder) / "store", Path(folder) / "run"
        data = str(DATA / "regen" / "train.parquet")
        limit = ("--limit", str(arguments.limit))
        specx("extract", "--target", str(DATA / "tiny-gpt-oss"), "--data", data, "--store", str(store), *limit)
        summary, cpu_seconds = train(store, run, arguments.steps, arguments.every, arguments.seed)
        kept = {step_of(each): each for each in Path(folder).glob("kept-[0-9]*") if (each / "checkpoints").is_dir()}
        curve = {step: accepted(each) for step, each in sorted(kept.items())}
        sampled = accepted(kept[max(kept)], "--engine", "transformers", "--temperature", "0.7")
    result = {
        "train_cpu_minutes": round(cpu_seconds / 60, 2),
        "simulated_acceptance_length": summary["acceptance_length"],
        "acceptance_length": curve[max(curve)]["acceptance_length"],
        "acceptance_length_by_step": {step: found["acceptance_length"] for step, found in curve.items()},
        "lossless": all(found["lossless"] for found in curve.values()),
        "acceptance_length_at_temperature_0.7": sampled["acceptance_length"],
    }
    if not arguments.json:
        for key, value in result.items():
            print(f"{key:40} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
