"""Exported drafts in the real engine, on a CPU, in float32; both in one process, which takes long to start."""

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

from .agreement import Job, Served, agreement, serve


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path, trained_run: Path
) -> dict[str, tuple[Job, Served]]:
    folder = tmp_path_factory.mktemp("served")
    config = EvaluateConfig(draft="", target=str(target), data=(str(regen / "dev.parquet"),), limit=10)
    prompts = [prompt.ids for prompt in read_prompts(config)]
    export(trained_run, folder / "trained", dtype="float32")
    write_untrained(folder / "untrained", trained_run)
    jobs = {name: Job(target=target, draft=folder / name, prompts=prompts) for name in ("trained", "untrained")}
    return serve(jobs, folder)


def write_untrained(path: Path, trained_run: Path) -> None:
    """Write a draft like that of the run, with its first weights."""
    trained = read_trained(RunDirectory(trained_run))
    torch.manual_seed(0)
    untrained = TrainedDraft(
        spec=trained.spec,
        weights={name: weight.detach() for name, weight in Draft(trained.spec).named_parameters()},
        vocabulary=trained.vocabulary,
        inv_freq=trained.inv_freq,
        attention_scaling=trained.attention_scaling,
    )
    write_draft(path, untrained, "float32", Form())


def acceptance_length(requests: Served) -> float:
    accepted = [count for request in requests for count in request["accepted"]]
    return 1 + sum(accepted) / len(accepted)


def test_vllm_proposes_what_our_own_chain_proposes(served: dict[str, tuple[Job, Served]]) -> None:
    job, requests = served["trained"]
    equal, positions = agreement(job, requests)
    assert positions >= 500
    assert equal / positions >= 0.99, f"{equal} of {positions}"
    assert acceptance_length(requests) > 1.5


def test_an_untrained_draft_is_accepted_no_better_than_chance(served: dict[str, tuple[Job, Served]]) -> None:
    _, requests = served["untrained"]
    assert acceptance_length(requests) == pytest.approx(1.0, abs=0.02)
