"""The estimate from stored features against hand-made walks, our own chain, and the real engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run as extract
from specx.train.data.batch import PADDING, Batch
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.estimate import EstimateSummary, _generations, _Walks
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.evaluate.prompts import read_prompts
from specx.train.evaluate.results_file import REQUESTS_FILE
from specx.train.loss.anchors import supervised_anchors


def test_the_walk_jumps_by_what_was_accepted_and_one() -> None:
    walks = _Walks()
    walks.add(np.array([2, 3, 3, 0, 1, 3, 0]), 10, "chat")
    # Anchors 0, 3, 4 and 6; from 10 on the context is that of the anchor, its token, and those that were emitted.
    assert walks.contexts == [(12, [2, 0, 1, 0])]
    assert walks.total.length == 1 + 3 / 4
    assert walks.categories["chat"] == walks.total
    assert walks.anchors.length == 1 + 12 / 7


def test_a_generation_starts_before_its_first_token_and_ends_where_tokens_are_not_known() -> None:
    # Two documents: prompt of 3 and 6 supervised tokens; prompt of 2, supervised 5, a new prompt of 1, supervised 5.
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]]).bool()
    documents = torch.tensor([[0] * 9 + [1] * 13 + [PADDING]])
    positions = torch.tensor([[*range(9), *range(13), 0]])
    batch = Batch(
        input_ids=torch.zeros_like(documents),
        loss_mask=mask,
        documents=documents,
        positions=positions,
        aux_hidden=torch.zeros(1, 23, 1, 4),
        argmax=torch.zeros_like(documents),
        lse=torch.zeros(1, 23),
    )
    found = list(_generations(batch, supervised_anchors(batch, 3)[-1]))
    # With 3 drafted tokens the anchor and 4 tokens behind it: the last of them is the last supervised one.
    assert found == [(0, 2, 5, 2, 0), (0, 10, 12, 1, 1), (0, 16, 18, 7, 1)]


@pytest.fixture(scope="module")
def greedy_rows(
    tmp_path_factory: pytest.TempPathFactory,
    results: dict[str, Path],
    target: Path,
    regen: Path,
    questions: Path,
) -> tuple[Path, list[list[int]]]:
    """What vLLM generated greedily without the draft, as rows; what it accepted of each with the draft."""
    data = (str(questions), str(regen / "dev.parquet"))
    prompts = read_prompts(EvaluateConfig(draft="", target=str(target), data=data, limit=14))
    requests = pq.read_table(results["vllm"] / REQUESTS_FILE).to_pylist()
    of_first_turns = [each for each in requests if each["turn"] == 0 and each["batch_size"] == 8]
    rows = [
        {
            "input_ids": prompts[each["prompt"]].ids + each["output_ids"],
            "loss_mask": [0] * each["prompt_length"] + [1] * len(each["output_ids"]),
            "category": each["category"],
        }
        for each in of_first_turns
        if not each["drafted"]
    ]
    path = tmp_path_factory.mktemp("greedy") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path, [each["accepted"] for each in of_first_turns if each["drafted"]]


@pytest.fixture(scope="module")
def greedy_store(tmp_path_factory: pytest.TempPathFactory, target: Path, greedy_rows: tuple[Path, Any]) -> Path:
    store = tmp_path_factory.mktemp("greedy") / "store"
    extract(ExtractConfig(target=str(target), data=(str(greedy_rows[0]),), store=str(store), dtype="float32"))
    return store


@pytest.fixture(scope="module")
def estimated(exported_draft: Path, greedy_store: Path) -> EstimateSummary:
    summary = evaluate(EvaluateConfig(draft=str(exported_draft), store=str(greedy_store), split="all"))
    assert isinstance(summary, EstimateSummary)
    return summary


def test_the_estimate_is_what_vllm_accepts_of_the_same_text(
    estimated: EstimateSummary, greedy_rows: tuple[Path, list[list[int]]]
) -> None:
    accepted = [count for request in greedy_rows[1] for count in request]
    assert estimated.acceptance_length == pytest.approx(1 + np.mean(accepted), rel=0.05)
    shares = [np.mean([count >= position for count in accepted]) for position in (1, 2, 3)]
    assert estimated.per_position == pytest.approx(shares, abs=0.05)
    assert estimated.sequences == 14


def test_greedy_text_is_hit_where_the_target_s_best_is(estimated: EstimateSummary) -> None:
    assert estimated.text_acceptance_length == pytest.approx(estimated.acceptance_length, rel=0.02)
    assert estimated.text_accuracy == pytest.approx(estimated.accuracy, abs=0.02)
    assert len(estimated.overlap) == 3
    assert all(0 < share < 1 for share in estimated.overlap)
    assert set(estimated.by_category) >= {"greeting", "history", "story"}


def test_sampled_text_is_hit_less_than_the_target_s_best(exported_draft: Path, tiny_store: Path) -> None:
    summary = evaluate(
        EvaluateConfig(draft=str(exported_draft), store=str(tiny_store), split="all", num_speculative_tokens=2)
    )
    assert isinstance(summary, EstimateSummary)
    assert 1.2 < summary.text_acceptance_length < summary.acceptance_length - 0.2
    assert len(summary.per_position) == len(summary.accuracy) == 2
    assert summary.acceptance_length == pytest.approx(1 + sum(summary.per_position), abs=1e-3)
    assert summary.sequences == 120


def test_sampling_cannot_be_estimated(exported_draft: Path, tiny_store: Path) -> None:
    settings = {"draft": str(exported_draft), "store": str(tiny_store)}
    with pytest.raises(ValueError, match="an estimate is of greedy decoding"):
        EvaluateConfig(**settings, temperature=0.7)
