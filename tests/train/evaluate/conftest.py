"""The same prompts decoded by both engines of our own, once: questions in two turns, and recorded token ids."""

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ...conftest import MadeOnce

MAX_NEW_TOKENS = 48
QUESTIONS = [
    ("greeting", "Hello! How are you today?", "And what will you do tomorrow?"),
    ("greeting", "What is your favourite food?", "Why do you like it so much?"),
    ("history", "Tell me about the state of our union.", "Say the same in fewer words."),
    ("story", "Tell me about the white whale.", "What did the captain say then?"),
]


@pytest.fixture(scope="session")
def questions(made_once: MadeOnce) -> Path:
    """A file of questions in two turns, of the shape of MT-Bench."""

    def build(path: Path) -> None:
        rows = [
            {"question_id": 81 + number, "category": category, "turns": turns}
            for number, (category, *turns) in enumerate(QUESTIONS)
        ]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    return made_once("questions.jsonl", build)


@pytest.fixture(scope="session")
def decoding_options(target: Path, regen: Path, questions: Path, exported_draft: Path) -> list[str]:
    """What is decoded: 4 questions of two turns and 10 recorded prompts, 18 requests."""
    options = ["--draft", exported_draft, "--target", target, "--data", questions, "--data", regen / "dev.parquet"]
    return [*map(str, options), "--limit", "14", "--max-new-tokens", str(MAX_NEW_TOKENS)]


@pytest.fixture(scope="session")
def results(
    made_once: MadeOnce, specx: Callable[..., subprocess.CompletedProcess[str]], decoding_options: list[str]
) -> dict[str, Path]:
    """The ``--out`` of each engine."""
    sizes = {"vllm": ["--batch-size", "1", "--batch-size", "8"], "transformers": []}

    def build(out: Path, engine: str) -> None:
        options = [*decoding_options, "--engine", engine, *sizes[engine], "--out", str(out)]
        finished = specx("evaluate", *options, "--json")
        assert finished.returncode == 0, finished.stderr[-3000:]
        (out / "stdout").write_text(finished.stdout)

    return {engine: made_once(f"results/{engine}", functools.partial(build, engine=engine)) for engine in sizes}


@pytest.fixture(scope="session")
def summaries(results: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What each engine printed."""
    return {engine: json.loads((out / "stdout").read_text().splitlines()[-1]) for engine, out in results.items()}
