"""Sampling in our own loop: what is drawn is the target's, with a draft as without."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.engines.transformers_engine import CachedTarget
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.evaluate.results_file import REQUESTS_FILE
from specx.train.evaluate.summary import EvaluateSummary

TIMES = 150


@pytest.fixture(scope="module")
def settings(target: Path, regen: Path, exported_draft: Path) -> dict[str, Any]:
    return {
        "draft": str(exported_draft),
        "target": str(target),
        "data": (str(regen / "dev.parquet"),),
        "engine": "transformers",
    }


def outputs(settings: dict[str, Any], out: Path) -> tuple[EvaluateSummary, dict[bool, list[list[int]]]]:
    """Decode; return the summary, and what was generated with the draft and without."""
    summary = evaluate(EvaluateConfig(**settings, out=str(out)))
    assert isinstance(summary, EvaluateSummary)
    rows = pq.read_table(out / REQUESTS_FILE).to_pylist()
    return summary, {
        drafted: [row["output_ids"] for row in rows if row["drafted"] is drafted] for drafted in (True, False)
    }


def test_each_token_is_drawn_with_the_probability_the_target_gives_it(target: Path, regen: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    [ids] = pq.read_table(regen / "dev.parquet").column("input_ids").slice(0, 1).to_pylist()
    with torch.inference_mode():
        likely = (model(input_ids=torch.tensor([ids])).logits[0] / 0.7).softmax(-1).max(-1)
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(20):
        drawn, _ = CachedTarget(model, (), 0.7, generator).forward(ids)
        hits += int((torch.tensor(drawn) == likely.indices).sum())
    expected = 20 * float(likely.values.sum())
    deviation = (20 * float((likely.values * (1 - likely.values)).sum())) ** 0.5
    assert deviation > 10
    assert abs(hits - expected) < 4 * deviation


def test_hardly_any_temperature_is_greedy(settings: dict[str, Any], tmp_path: Path) -> None:
    few = settings | {"limit": 4, "max_new_tokens": 32}
    greedy, best = outputs(few, tmp_path / "greedy")
    sampled, drawn = outputs(few | {"temperature": 1e-5}, tmp_path / "sampled")
    assert drawn == best
    assert sampled.acceptance_length == greedy.acceptance_length
    assert (greedy.lossless, sampled.lossless) == (True, None)


def test_a_draft_does_not_change_what_is_drawn(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = pq.read_table(settings["data"][0]).slice(0, 1)
    data = tmp_path / "rows.parquet"
    pq.write_table(rows.take([0] * TIMES), data)
    again = settings | {"data": (str(data),), "max_new_tokens": 4, "temperature": 1.0}
    summary, drawn = outputs(again, tmp_path / "out")
    assert summary.acceptance_length > 1.2
    for place in range(4):
        counts = [Counter(ids[place] for ids in drawn[drafted] if len(ids) > place) for drafted in (True, False)]
        totals = [sum(count.values()) for count in counts]
        for token, _ in (counts[0] + counts[1]).most_common(5):
            share = (counts[0][token] + counts[1][token]) / sum(totals)
            deviation = (share * (1 - share) * (1 / totals[0] + 1 / totals[1])) ** 0.5
            difference = counts[0][token] / totals[0] - counts[1][token] / totals[1]
            assert abs(difference) <= 4 * deviation, (place, token)
    assert len({tuple(ids) for ids in drawn[True]}) > TIMES / 5
