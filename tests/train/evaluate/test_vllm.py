"""Exported drafts in the real engine, on a CPU, in float32."""

from pathlib import Path

import pytest
import torch

from specx.train.check import TrainedDraft
from specx.train.draft import Draft
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.prompts import read_prompts
from specx.train.export import export, read_trained, write_draft
from specx.train.forms import Form
from specx.train.run import RunDirectory

from .agreement import Job, agreement, serve


@pytest.fixture(scope="module")
def prompts(target: Path, regen: Path) -> list[list[int]]:
    config = EvaluateConfig(draft="", target=str(target), data=(str(regen / "dev.parquet"),), limit=10)
    return [prompt.ids for prompt in read_prompts(config)]


def test_vllm_proposes_what_our_own_chain_proposes(
    tmp_path: Path, target: Path, trained_run: Path, prompts: list[list[int]]
) -> None:
    export(trained_run, tmp_path / "draft", dtype="float32")
    job = Job(target=target, draft=tmp_path / "draft", prompts=prompts)
    (served,) = serve([job], tmp_path)
    equal, positions = agreement(job, served)
    assert positions >= 500
    assert equal / positions >= 0.99, f"{equal} of {positions}"
    accepted_counts = [count for request in served for count in request["accepted"]]
    assert 1 + sum(accepted_counts) / len(accepted_counts) > 1.5


def test_an_untrained_draft_is_accepted_no_better_than_chance(
    tmp_path: Path, target: Path, trained_run: Path, prompts: list[list[int]]
) -> None:
    trained = read_trained(RunDirectory(trained_run))
    torch.manual_seed(0)
    weights = {name: weight.detach() for name, weight in Draft(trained.spec).named_parameters()}
    untrained = TrainedDraft(
        spec=trained.spec,
        weights=weights,
        vocabulary=trained.vocabulary,
        inv_freq=trained.inv_freq,
        attention_scaling=trained.attention_scaling,
    )
    write_draft(tmp_path / "draft", untrained, "float32", Form())
    (served,) = serve([Job(target=target, draft=tmp_path / "draft", prompts=prompts)], tmp_path)
    accepted = [count for request in served for count in request["accepted"]]
    assert 1 + sum(accepted) / len(accepted) == pytest.approx(1.0, abs=0.02)
