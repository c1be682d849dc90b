"""``specx evaluate`` from the command line: both engines judge alike."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from specx import SpecxError
from specx.config import load_config
from specx.train.config import TrainConfig
from specx.train.evaluate.chat_template import ChatTemplate
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.evaluate.results_file import REQUESTS_FILE, RESULT_FILE
from specx.train.evaluate.summary import EvaluateSummary
from specx.train.export.write import export
from specx.train.pipeline import run as train

from .conftest import MAX_NEW_TOKENS, QUESTIONS

pytestmark = pytest.mark.long

KEYS = {
    "acceptance_length",
    "per_position",
    "by_category",
    "by_context",
    "lossless",
    "tokens_per_s",
    "baseline_tokens_per_s",
    "requests",
    "verifications",
    "left_out",
    "table",
}


Summary = dict[str, Any]


@pytest.fixture(params=["vllm", "transformers"])
def summary(request: pytest.FixtureRequest, summaries: dict[str, Summary]) -> Summary:
    return summaries[request.param]


def test_the_summary_has_the_keys_of_the_contract(summary: Summary) -> None:
    assert set(summary) == KEYS
    assert summary["left_out"] == 0


def test_greedy_output_is_the_target_s_own(summary: Summary) -> None:
    assert summary["lossless"] is True


def test_a_trained_draft_is_accepted_well_above_chance(summary: Summary) -> None:
    assert summary["acceptance_length"] > 1.5
    shares = summary["per_position"]
    assert len(shares) == 3
    assert shares[0] > shares[1] > shares[2] > 0
    assert summary["acceptance_length"] == pytest.approx(1 + sum(shares), abs=1e-3)


def test_both_engines_find_the_same_acceptance_length(summaries: dict[str, Summary]) -> None:
    lengths = [found["acceptance_length"] for found in summaries.values()]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)


def test_batch_sizes_are_measured_apart_and_accept_alike(summaries: dict[str, Summary]) -> None:
    rows = {row["batch_size"]: row for row in summaries["vllm"]["table"] if row["category"] == "all"}
    assert set(rows) == {1, 8}
    assert rows[1]["acceptance_length"] == pytest.approx(rows[8]["acceptance_length"], rel=0.02)
    for row in rows.values():
        assert row["requests"] == 18
        rate, alone = row["tokens_per_s"], row["baseline_tokens_per_s"]
        # It is of the rates before they were rounded, and rounded itself.
        rounding = 0.05 + 100 * rate / alone * (0.05 / rate + 0.05 / alone)
        assert row["delta_percent"] == pytest.approx(100 * (rate / alone - 1), abs=rounding)
    assert {row["category"] for row in summaries["vllm"]["table"]} >= {"all", "greeting", "history", "story"}


def test_a_second_turn_follows_the_target_s_own_answer(results: dict[str, Path], target: Path) -> None:
    rows = pq.read_table(results["vllm"] / REQUESTS_FILE).to_pylist()
    template = ChatTemplate(target)
    for number, (_, first, second) in enumerate(QUESTIONS):
        for row in [each for each in rows if (each["prompt"], each["turn"]) == (number, 0)]:
            said = [{"role": "user", "content": first}]
            assert row["prompt_length"] == len(template.prompt(said, ""))
            said += [{"role": "assistant", "content": template.answer(row["output_ids"])}]
            said += [{"role": "user", "content": second}]
            (then,) = (
                each
                for each in rows
                if (each["prompt"], each["turn"]) == (number, 1)
                and (each["drafted"], each["batch_size"]) == (row["drafted"], row["batch_size"])
            )
            assert then["prompt_length"] == len(template.prompt(said, ""))


def test_there_is_a_row_for_each_request(results: dict[str, Path], summaries: dict[str, Summary]) -> None:
    rows = pq.read_table(results["vllm"] / REQUESTS_FILE).to_pylist()
    assert len(rows) == 18 * 2 * 2
    drafted = [row for row in rows if row["drafted"]]
    assert sum(row["verifications"] for row in drafted) == summaries["vllm"]["verifications"]
    assert all(len(row["accepted"]) == row["verifications"] for row in drafted)
    assert all(0 < len(row["output_ids"]) <= MAX_NEW_TOKENS and row["seconds"] > 0 for row in rows)
    written = json.loads((results["vllm"] / RESULT_FILE).read_text())
    assert written["acceptance_length"] == summaries["vllm"]["acceptance_length"]


@pytest.fixture
def settings(exported_draft: Path, target: Path, questions: Path, tmp_path: Path) -> Summary:
    return {
        "draft": str(exported_draft),
        "target": str(target),
        "data": (str(questions),),
        "engine": "transformers",
        "limit": 2,
        "max_new_tokens": 6,
        "out": str(tmp_path / "out"),
    }


def test_a_rerun_measures_only_what_is_missing(settings: Summary) -> None:
    first = evaluate(EvaluateConfig(**settings))
    path = Path(settings["out"]) / REQUESTS_FILE
    written = path.stat().st_mtime_ns
    (Path(settings["out"]) / RESULT_FILE).unlink()
    assert evaluate(EvaluateConfig(**settings)) == first
    assert path.stat().st_mtime_ns == written
    assert (Path(settings["out"]) / RESULT_FILE).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 7}, "measured with max_new_tokens 6, this run has 7. Choose another --out"),
        ({"limit": 1}, "measured with limit 2, this run has 1"),
        ({"num_speculative_tokens": 2}, "measured with num_speculative_tokens 3, this run has 2"),
    ],
    ids=str,
)
def test_a_rerun_with_another_setting_is_refused_by_name(settings: Summary, change: Summary, message: str) -> None:
    settings |= {"limit": 2}
    path = Path(settings["out"]) / REQUESTS_FILE
    evaluate(EvaluateConfig(**settings))
    with pytest.raises(SpecxError, match=message) as caught:
        evaluate(EvaluateConfig(**settings | change))
    assert str(caught.value).startswith(str(path))


def test_a_rerun_with_other_prompts_is_refused(settings: Summary, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Hello"}\n{"prompt": "Good bye"}\n')
    evaluate(EvaluateConfig(**settings))
    with pytest.raises(SpecxError, match="measured with prompts"):
        evaluate(EvaluateConfig(**settings | {"data": (str(other),)}))


def test_held_out_sequences_of_a_store_are_prompts(settings: Summary, tiny_store: Path) -> None:
    summary = evaluate(EvaluateConfig(**settings | {"data": (), "store": str(tiny_store), "holdout_fraction": 0.1}))
    assert isinstance(summary, EvaluateSummary)
    assert summary.lossless is True
    assert summary.requests == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ()}, "no prompts; give --data or --store"),
        ({"target": None}, "no target; give --target, or --store"),
        ({"engine": "server"}, "--engine server and --url go together"),
        ({"baseline_url": "http://h"}, "--baseline-url is for --engine server"),
        ({"batch_sizes": (8,)}, "--engine transformers decodes one at a time"),
        ({"batch_sizes": (0,)}, "greater than or equal to 1"),
        ({"date": "today"}, "date"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings: Summary, change: Summary, message: str) -> None:
    given = {key: value for key, value in (settings | change).items() if value is not None}
    with pytest.raises(SpecxError, match=message):
        load_config(EvaluateConfig, None, given)


def test_sampling_in_vllm_on_a_cpu_is_refused(settings: Summary) -> None:
    with pytest.raises(SpecxError, match=r"temperature: 0\.7; vLLM's CPU build"):
        evaluate(EvaluateConfig(**settings | {"engine": "vllm", "temperature": 0.7}))


def test_an_eagle1_draft_is_decoded_by_the_chain_without_changing_the_output(
    tmp_path: Path, target: Path, regen: Path, tiny_store: Path
) -> None:
    settings = {
        "store": str(tiny_store),
        "out": str(tmp_path / "run"),
        "max_steps": 40,
        "step_tokens": 1024,
        "lr": 3e-3,
    }
    train(TrainConfig.model_validate({"preset": "eagle1", "warmup_fraction": 0.0, **settings}))
    assert export(tmp_path / "run", tmp_path / "draft", engine="vllm").engines == ["vllm"]
    decoding = {"draft": str(tmp_path / "draft"), "target": str(target), "data": (str(regen / "dev.parquet"),)}
    summary = evaluate(EvaluateConfig(**decoding, engine="transformers", limit=4, max_new_tokens=48))
    assert isinstance(summary, EvaluateSummary)
    assert summary.lossless is True
    assert summary.acceptance_length > 1.2
