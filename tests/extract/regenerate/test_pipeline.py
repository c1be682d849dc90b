"""``specx regenerate`` on the real engine: every prompt answered once, as it was served, whatever is killed.

Shapes: T tokens of a prompt.
"""

import itertools
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from specx.extract.config import ExtractConfig
from specx.extract.data.samples import Sample, SampleReader
from specx.extract.regenerate.answer_file import AnswersError
from specx.extract.regenerate.config import RegenerateConfig
from specx.extract.regenerate.pipeline import run
from specx.extract.target import open_target

from ...program import SPECX

pytestmark = pytest.mark.long

KILLS = 2
PROMPTS = 200
NEW_TOKENS = 96
ANSWERS_PER_PIECE = 16
COLUMNS = [
    "id",
    "category",
    "messages",
    "input_ids",
    "loss_mask",
    "finish_reason",
    "text",
    "reasoning_effort",
    "date",
    "source",
    "row",
]


def command(target: Path, data: Path, out: Path, *options: str) -> list[str]:
    return [*SPECX, "regenerate", "--json", "--target", str(target), "--data", str(data), "--out", str(out), *options]


def pieces(out: Path) -> list[Path]:
    return list(out.with_name(f"{out.name}.pieces").glob("*.parquet"))


def wait_for_pieces(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(pieces(out)) < count:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "no pieces"
        time.sleep(0.01)


def processes_left(session: int) -> list[str]:
    """Return the processes of a session that have not ended after some seconds."""
    for _ in range(100):
        left = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                # Its name, in brackets, may have spaces.
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    left.append(path.parent.name)
        if not left:
            break
        time.sleep(0.1)
    return left


@pytest.fixture(scope="module")
def recorded(regen: Path) -> list[dict[str, Any]]:
    return pq.read_table(regen / "train.parquet").slice(0, PROMPTS).to_pylist()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path) -> dict[str, Any]:
    """A run that is killed twice and then interrupted: its output, and what was there after each end."""
    out = tmp_path_factory.mktemp("killed") / "answers.parquet"
    settings = out.with_name("run.yaml")
    settings.write_text(
        f"answers_per_piece: {ANSWERS_PER_PIECE}\nmax_new_tokens: {NEW_TOKENS}\ntemperature: 0.7\n"
        # All prompts at once would end at once, and leave no time between two pieces and the end.
        f"engine_options: {{max_num_seqs: {ANSWERS_PER_PIECE}}}\n"
    )
    start = command(target, regen / "train.parquet", out, "--limit", str(PROMPTS), "--config", str(settings))
    kept, orphans = [], []
    for number in range(KILLS + 1):
        wanted, how = kept[-1] + 2 if kept else 2, signal.SIGKILL if number < KILLS else signal.SIGINT
        process = subprocess.Popen(
            start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_for_pieces(process, out, wanted)
        if how == signal.SIGKILL:
            process.kill()
        else:
            # As a terminal does it: vLLM's processes hear it too.
            os.killpg(process.pid, how)
        stderr = process.communicate()[1]
        orphans.append(processes_left(process.pid))
        kept.append(len(pieces(out)))
        assert not out.exists()
    done = subprocess.run(start, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {
        "out": out,
        "summary": json.loads(done.stdout.splitlines()[-1]),
        "kept": kept,
        "settings": settings,
        "orphans": orphans,
        "interrupted": (process.returncode, stderr),
    }


@pytest.fixture(scope="module")
def answers(killed: dict[str, Any]) -> list[dict[str, Any]]:
    return pq.read_table(killed["out"]).to_pylist()


def test_every_prompt_is_answered_once_after_two_kills_and_an_interrupt(
    killed: dict[str, Any], answers: list[dict[str, Any]], regen: Path
) -> None:
    assert Counter(answer["row"] for answer in answers) == Counter(range(PROMPTS))
    assert {answer["source"] for answer in answers} == {str(regen / "train.parquet")}
    assert list(answers[0]) == COLUMNS
    summary = killed["summary"]
    assert killed["kept"][0] > 0
    assert all(before < after for before, after in itertools.pairwise(killed["kept"]))
    # The last piece, of the run that was interrupted, may be a small one, or a copy of the one before.
    assert summary["reused"] >= (killed["kept"][-1] - 1) * ANSWERS_PER_PIECE
    assert (summary["answers"] + summary["reused"], summary["rejected"]) == (PROMPTS, 0)
    assert not killed["out"].with_name("answers.parquet.pieces").exists()


def test_vllms_processes_end_with_the_one_that_was_killed(killed: dict[str, Any]) -> None:
    assert killed["orphans"] == [[]] * (KILLS + 1)


def test_an_interrupted_run_says_that_it_can_go_on_and_exits_with_130(killed: dict[str, Any]) -> None:
    code, stderr = killed["interrupted"]
    assert code == 130
    assert "interrupted; finished answers are kept, rerun to go on" in stderr
    assert "Traceback" not in stderr


def test_prompts_are_as_served_and_the_mask_is_on_what_was_sampled(
    answers: list[dict[str, Any]], recorded: list[dict[str, Any]]
) -> None:
    for answer in answers:
        before = recorded[answer["row"]]
        length = before["loss_mask"].index(1)
        assert answer["input_ids"][:length] == before["input_ids"][:length]
        assert answer["loss_mask"] == [0] * length + [1] * (len(answer["input_ids"]) - length)
        assert answer["messages"] == before["messages"]
        assert (answer["id"], answer["category"]) == (before["id"], before["category"])


def test_only_whole_answers_have_an_end_token(answers: list[dict[str, Any]], target: Path) -> None:
    ends = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    reasons = Counter(answer["finish_reason"] for answer in answers)
    assert set(reasons) == {"stop", "length"}
    for answer in answers:
        sampled = answer["input_ids"][answer["loss_mask"].index(1) :]
        if answer["finish_reason"] == "stop":
            assert sampled[-1] in ends
            assert not set(sampled[:-1]) & set(ends)
        else:
            assert len(sampled) == NEW_TOKENS
            assert not set(sampled) & set(ends)


def test_extract_reads_the_answers_as_they_were_sampled(
    killed: dict[str, Any], answers: list[dict[str, Any]], target: Path
) -> None:
    config = ExtractConfig(target=str(target), data=(str(killed["out"]),), store="unused")
    samples = list(SampleReader(config, open_target(str(target))))
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [sample.input_ids.tolist() for sample in samples] == [answer["input_ids"] for answer in answers]
    assert [sample.loss_mask.tolist() for sample in samples] == [answer["loss_mask"] for answer in answers]


def test_a_finished_file_is_left_as_it_is_and_other_settings_are_refused(
    killed: dict[str, Any], target: Path, regen: Path, specx: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    before = killed["out"].read_bytes()
    options = ("--limit", str(PROMPTS), "--config", str(killed["settings"]))
    arguments = command(target, regen / "train.parquet", killed["out"], *options)[len(SPECX) :]
    again = specx(*arguments)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout.splitlines()[-1])
    assert (summary["answers"], summary["reused"]) == (0, PROMPTS)
    refused = specx(*arguments, "--temperature", "0.8", "--reasoning-effort", "high")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "temperature is 0.7 in the file, 0.8 in this run" in line
    assert "reasoning_effort is None in the file, high in this run" in line
    assert killed["out"].read_bytes() == before


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path) -> dict[str, Any]:
    """Greedy answers to conversations, some of them unusable."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = (regen / "conversations.jsonl").read_text().splitlines()[:6]
    rows = [json.loads(line) for line in lines]
    rows[1] = {"messages": [{"role": "user", "content": "Are you there?"}], "uuid": "asked", "category": "test"}
    rows[2] = {"messages": []}
    rows[3] = {"conversations": [{"from": "human", "value": "Tell me more."}, {"from": "gpt", "value": "No."}]}
    rows[4] = {"messages": [{"role": "user", "content": "whale " * 5000}]}
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "answers.parquet"
    process = subprocess.run(
        command(target, data, out, "--temperature", "0", "--max-new-tokens", "48", "--dtype", "float32"),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return {
        "rows": {answer["row"]: answer for answer in pq.read_table(out).to_pylist()},
        "rejects": pq.read_table(out.with_suffix(".rejects.parquet")).to_pylist(),
        "summary": json.loads(process.stdout.splitlines()[-1]),
    }


def test_greedy_answers_are_the_targets_own(mixed: dict[str, Any], target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True).eval()
    for answer in mixed["rows"].values():
        length = answer["loss_mask"].index(1)
        prompt, sampled = answer["input_ids"][:length], answer["input_ids"][length:]
        with torch.inference_mode():
            generated = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, length, dtype=torch.int64),
                max_new_tokens=48,
                do_sample=False,
            )
        assert generated[0, length:].tolist() == sampled


def test_conversations_of_every_kind_are_asked_and_the_others_are_not_lost(mixed: dict[str, Any]) -> None:
    assert sorted(mixed["rows"]) == [0, 1, 3, 5]
    assert [(reject["row"], reject["reason"]) for reject in mixed["rejects"]] == [(2, "empty"), (4, "too_long")]
    assert (mixed["summary"]["answers"], mixed["summary"]["rejected"]) == (4, 2)
    asked = mixed["rows"][1]
    assert (asked["id"], asked["category"]) == ("asked", "test")
    assert asked["messages"] == [{"role": "user", "content": "Are you there?"}]
    assert mixed["rows"][3]["messages"] == [{"role": "user", "content": "Tell me more."}]
    # The answer that the data came with is not part of the prompt.
    assert mixed["rows"][0]["messages"][-1]["role"] == "user"


def test_a_file_of_somebody_else_is_not_touched(target: Path, regen: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    out.write_bytes((regen / "dev.parquet").read_bytes())
    config = RegenerateConfig(target=str(target), data=(str(regen / "dev.parquet"),), out=str(out))
    with pytest.raises(AnswersError, match="not written by `specx regenerate`"):
        run(config)
    assert out.read_bytes() == (regen / "dev.parquet").read_bytes()
