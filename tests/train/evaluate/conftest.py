"""The same prompts decoded by both engines of our own, once: questions in two turns, and recorded token ids."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MAX_NEW_TOKENS = 48
QUESTIONS = [
    ("greeting", "Hello! How are you today?", "And what will you do tomorrow?"),
    ("greeting", "What is your favourite food?", "Why do you like it so much?"),
    ("history", "Tell me about the state of our union.", "Say the same in fewer words."),
    ("story", "Tell me about the white whale.", "What did the captain say then?"),
]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of questions in two turns, of the shape of MT-Bench."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {"question_id": 81 + number, "category": category, "turns": turns}
        for number, (category, *turns) in enumerate(QUESTIONS)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def decoding_options(target: Path, regen: Path, questions: Path, exported_draft: Path) -> list[str]:
    """What is decoded: 4 questions of two turns and 10 recorded prompts, 18 requests."""
    options = ["--draft", exported_draft, "--target", target, "--data", questions, "--data", regen / "dev.parquet"]
    return [*map(str, options), "--limit", "14", "--max-new-tokens", str(MAX_NEW_TOKENS)]


@pytest.fixture(scope="session")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    specx: Callable[..., subprocess.CompletedProcess[str]],
    decoding_options: list[str],
) -> dict[str, Path]:
    """The ``--out`` of each engine."""
    folder = tmp_path_factory.mktemp("results")
    sizes = {"vllm": ["--batch-size", "1", "--batch-size", "8"], "transformers": []}
    for engine, batch_sizes in sizes.items():
        options = [*decoding_options, "--engine", engine, *batch_sizes, "--out", str(folder / engine)]
        finished = specx("evaluate", *options, "--json")
        assert finished.returncode == 0, finished.stderr[-3000:]
        (folder / engine / "stdout").write_text(finished.stdout)
    return {engine: folder / engine for engine in sizes}


@pytest.fixture(scope="session")
def summaries(results: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What each engine printed."""
    return {engine: json.loads((out / "stdout").read_text().splitlines()[-1]) for engine, out in results.items()}
