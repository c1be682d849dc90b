"""What a draft loses by another rope than its target's: in training, and between training and serving.

Trains drafts of the tiny gpt-oss with four ropes on conversations of 512 and of 2048 tokens, serves each
with the rope it was trained with and with others, and tells the acceptance length by context: by the estimate from
stored features for all of them, and in vLLM for some. What is finished is not done again.

    make study-rope                              # .study/rope: results.json, tables.md, yarn.svg
    python -m specx.tests.studies.rope --quick   # minutes, and no result: whether it runs
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..program import SPECX
from .rope_drafts import (
    SERVED,
    TARGET_ROPE,
    Job,
    correlations,
    drafts,
    measure,
    rope_blocks,
    rows_file,
    store_with_rope,
    write_json,
)
from .rope_page import plot, tables
from .rope_texts import BUCKETS, conversations, described, pieces, questions, read_turns, write_rows

DATA = Path(__file__).parents[1] / "data"
TARGET = DATA / "tiny-gpt-oss"

CHECKED = ((TARGET_ROPE, TARGET_ROPE), ("plain-150000", "plain-150000"), ("plain-150000", TARGET_ROPE))
"""Ropes to train and to serve with, of the drafts of the shorter conversations and seed 0 that vLLM decodes with."""

_HELD_OUT_TURNS = 400
"""The last ones of ``train.parquet`` are asked with those of ``dev.parquet``, which are few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides the result."""

    lengths: tuple[int, ...] = (512, 2048)
    """Tokens of the conversations that drafts are trained on, each a multiple of those before it."""
    seeds: int = 3
    train_turns: int = 1200
    steps: int = 300
    questions: int = 60
    """Asked in each bucket."""
    new_tokens: int = 128
    checked: int = len(CHECKED)


QUICK = Settings(seeds=1, train_turns=60, steps=5, questions=4, new_tokens=32, checked=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="Everything that is made; by default .study/rope, or .study/rope-quick."
    )
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    out = arguments.out or Path(".study", "rope-quick" if arguments.quick else "rope")
    run(settings, out.absolute())


def run(settings: Settings, out: Path) -> None:
    """Do what is missing, and write the results."""
    require_same(settings, out)
    stages: list[tuple[str, Callable[[Settings, Path], None]]] = [
        ("texts", make_texts),
        ("stores", make_stores),
        ("drafts", make_drafts),
        ("vllm", decode),
    ]
    times = out / "seconds.json"
    seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    for name, stage in stages:
        started = time.monotonic()
        stage(settings, out)
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 1)
        write_json(seconds, times)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    results = {
        "settings": asdict(settings),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
        "seconds": seconds,
        "texts": described(pq.read_table(out / "texts" / "answers.parquet").to_pylist()),
        "rows": [row for job in jobs(settings) for row in json.loads(rows_file(out, job).read_text())],
        "correlations": correlations(TARGET),
        "vllm": [json.loads(path.read_text()) for path in sorted((out / "vllm").glob("*.json"))],
    }
    write_json(results, out / "results.json")
    (out / "tables.md").write_text(tables(results))
    plot(results, out / "yarn.svg")
    print(f"{out}: results.json, tables.md, yarn.svg; {sum(seconds.values()) / 60:.1f} minutes in all")


def require_same(settings: Settings, out: Path) -> None:
    """Begin a study at ``out``, or go on with one; end the program if it is another one."""
    path = out / "settings.json"
    # As they come back: lists for tuples.
    ours = json.loads(json.dumps(asdict(settings)))
    if path.exists() and (found := json.loads(path.read_text())) != ours:
        sys.exit(f"{out}: a study with other settings, {found}, now {ours}. Choose another --out, or delete it.")
    write_json(ours, path)


def jobs(settings: Settings) -> list[Job]:
    """Return all drafts, those of a seed together."""
    return [
        Job(rope=rope, length=length, seed=seed)
        for seed in range(settings.seeds)
        for length in settings.lengths
        for rope in SERVED
    ]


def make_texts(settings: Settings, out: Path) -> None:
    """Cut the training conversations, and have the target answer the questions greedily."""
    texts = out / "texts"
    system, turns = read_turns(DATA / "regen" / "train.parquet", TARGET)
    trained, held_out = turns[:-_HELD_OUT_TURNS], turns[-_HELD_OUT_TURNS:]
    random.Random(0).shuffle(trained)
    long = conversations(system, trained[: settings.train_turns], max(settings.lengths))
    for length in settings.lengths:
        write_rows(pieces(long, length), texts / f"train-{length}.parquet")
    same, dev = read_turns(DATA / "regen" / "dev.parquet", TARGET)
    assert same == system
    room = BUCKETS[-1][1] - settings.new_tokens - 8
    asked = questions(system, dev + held_out, settings.questions, room, seed=0)
    write_rows(asked, texts / "questions.parquet")
    command = ["regenerate", "--target", str(TARGET), "--data", str(texts / "questions.parquet")]
    command += ["--out", str(texts / "answers.parquet"), "--temperature", "0", "--dtype", "float32"]
    specx(*command, "--max-new-tokens", str(settings.new_tokens), "--date", "2026-11-21")


def make_stores(settings: Settings, out: Path) -> None:
    """Extract features of all texts, and make a store for each rope to train with."""
    stores = out / "stores"
    data = {f"train-{length}": f"train-{length}" for length in settings.lengths} | {"questions": "answers"}
    for name, file in data.items():
        command = ["extract", "--target", str(TARGET), "--data", str(out / "texts" / f"{file}.parquet")]
        # vLLM's attention does not lay out the scores of a long conversation in memory.
        command += ["--engine", "vllm", "--dtype", "float32", "--top-k", "1"]
        specx(*command, "--store", str(stores / name))
    blocks = rope_blocks(TARGET)
    for rope in SERVED:
        for length in settings.lengths:
            store_with_rope(stores / f"train-{length}", stores / f"{rope}-{length}", blocks[rope])


def make_drafts(settings: Settings, out: Path) -> None:
    """Train and estimate, a draft on each core: two threads on one draft do less."""
    recipe = {
        "max_steps": settings.steps,
        "step_tokens": 2048,
        "ttt_steps": 3,
        "draft_vocab_size": 1024,
        "holdout_fraction": 0.0,
        "lr": 3e-3,
        "betas": (0.9, 0.99),
        "warmup_fraction": 0.05,
        "loggers": ("csv",),
    }
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        started = time.monotonic()
        waiting = [(job, pool.submit(measure, job, out, TARGET, recipe)) for job in jobs(settings)]
        for job, future in waiting:
            row = future.result()[0]
            print(f"{job.name}: {row['acceptance_length']} as trained; {time.monotonic() - started:.0f} s", flush=True)
    del os.environ["OMP_NUM_THREADS"]


def decode(settings: Settings, out: Path) -> None:
    """Decode the questions in vLLM with some of the drafts."""
    for trained, served in CHECKED[: settings.checked]:
        job = Job(rope=trained, length=min(settings.lengths), seed=0)
        result = out / "vllm" / f"{job.name}-served-{served}.json"
        if result.exists():
            continue
        command = ["evaluate", "--draft", str(drafts(out, job, served)), "--target", str(TARGET)]
        command += ["--data", str(out / "texts" / "answers.parquet"), "--max-new-tokens", str(settings.new_tokens)]
        requests = out / "vllm" / result.stem
        found = specx(*command, "--out", str(requests))
        kept = {key: found[key] for key in ("acceptance_length", "by_context", "lossless", "verifications")}
        kept["by_context_verifications"] = verifications(requests / "requests.parquet")
        write_json({"trained": trained, "length": job.length, "served": served, "seed": job.seed} | kept, result)


def verifications(path: Path) -> dict[str, int]:
    """Count an engine's verifications by bucket."""
    counts = dict.fromkeys(BUCKETS, 0)
    for row in pq.read_table(path).to_pylist():
        context = row["prompt_length"] + 1
        for accepted in row["accepted"] or []:
            counts[next(each for each in BUCKETS if each[0] <= context < each[1])] += 1
            context += accepted + 1
    return {f"{low}-{high}": count for (low, high), count in counts.items()}


def specx(*arguments: str) -> dict[str, Any]:
    """Run a command; return its JSON."""
    done = subprocess.run([*SPECX, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
