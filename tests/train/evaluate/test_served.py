"""Every kind of draft, and drafts of every target, in the real engine on a CPU: vLLM proposes what our chain does.

They are served by two processes, one of them for the variants of the tiny gpt-oss's draft, as it takes longer to start
than to decode.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run as extract
from specx.train.config import TrainConfig
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.prompts import read_prompts
from specx.train.export.verify import TrainedDraft
from specx.train.export.write import export, read_trained, write_draft
from specx.train.families.checkpoint import Form
from specx.train.families.eagle3.draft import Eagle3Draft
from specx.train.loop.run_directory import RunDirectory
from specx.train.pipeline import run as train

from ..targets import CONFIGS, make_rows, make_target
from .agreement import Job, Served, agreement, serve

pytestmark = pytest.mark.long

PLAIN = {"norm_output": False, "fc_norm": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "eagle3": {"preset": "eagle3", "ttt_steps": 3},
    "specdrift": {"preset": "specdrift", "max_length": None},
    "norm_before_fc": {"fc_norm": False, "norm_before_fc": True},
    "norm_before_residual": {**PLAIN, "norm_before_residual": True},
    "window": {"sliding_window": 24},
    "trained embeddings": {"train_embeddings": True},
    "full vocabulary": {"draft_vocab_size": 2048},
    "one boundary": {"boundaries": (3,)},
    "two boundaries": {"boundaries": (1, 5)},
    "speculators": {**PLAIN, "norm_before_residual": True},
    "speculators, two boundaries": {"boundaries": (1, 5), "sliding_window": 24},
    "eagle1": {"preset": "eagle1"},
}
SGLANG_TOO = {"eagle3", "specdrift", "window", "full vocabulary", "two boundaries"}
STEPS = {
    "max_steps": 3,
    "step_tokens": 1024,
    "draft_vocab_size": 1024,
    "lr": 3e-3,
    "warmup_fraction": 0.0,
    "holdout_fraction": 0.0,
}


def recorded_prompts(target: Path, regen: Path, count: int) -> list[list[int]]:
    config = EvaluateConfig(draft="", target=str(target), data=(str(regen / "dev.parquet"),), limit=count)
    return [prompt.ids for prompt in read_prompts(config)]


@pytest.fixture(scope="module")
def served_variants(
    tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path, tiny_store: Path
) -> dict[str, tuple[Job, Served]]:
    folder = tmp_path_factory.mktemp("variants")
    prompts = recorded_prompts(target, regen, 3)
    jobs = {}
    for name, settings in VARIANTS.items():
        run, draft = folder / name / "run", folder / name / "draft"
        given = {"store": str(tiny_store), "out": str(run)} | STEPS | settings
        if settings.get("preset") == "eagle1":
            del given["draft_vocab_size"]  # it has the full one
        train(TrainConfig.model_validate(given))
        form = "speculators" if name.startswith("speculators") else "native"
        summary = export(run, draft, dtype="float32", format=form)
        assert summary.engines == (["vllm", "sglang"] if name in SGLANG_TOO else ["vllm"])
        jobs[name] = Job(target=target, draft=draft, prompts=prompts)
    return serve(jobs, folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_served_as_it_was_trained(name: str, served_variants: dict[str, tuple[Job, Served]]) -> None:
    equal, positions = agreement(*served_variants[name])
    assert positions >= 200
    assert equal / positions >= 0.99, f"{equal} of {positions}"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("specdrift", {"norm_output": False}),
        ("specdrift", {"fc_norm": False}),
        ("norm_before_fc", {"norm_before_fc": False}),
        ("norm_before_residual", {"norm_before_residual": False}),
        ("window", {"sliding_window": None}),
        ("window", {"sliding_window": 23}),
        ("trained embeddings", {"trained_embeddings": False}),
    ],
    ids=str,
)
def test_a_switch_that_the_engine_took_otherwise_would_be_noticed(
    name: str, changes: dict[str, Any], served_variants: dict[str, tuple[Job, Served]]
) -> None:
    equal, positions = agreement(*served_variants[name], **changes)
    assert equal / positions < 0.99, f"{equal} of {positions}"


@pytest.fixture(scope="module")
def served_targets(
    tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path, trained_run: Path
) -> dict[str, tuple[Job, Served]]:
    """Drafts of the other targets, and one of the tiny gpt-oss that was trained for longer, and not at all."""
    folder = tmp_path_factory.mktemp("targets")
    export(trained_run, folder / "trained", dtype="float32")
    write_untrained(folder / "untrained", trained_run)
    prompts = recorded_prompts(target, regen, 10)
    jobs = {name: Job(target=target, draft=folder / name, prompts=prompts) for name in ("trained", "untrained")}
    rows = make_rows(folder / "rows.parquet")
    for name in CONFIGS:
        other = make_target(folder / name / "target", name)
        store, run, draft = (folder / name / part for part in ("store", "run", "draft"))
        extract(ExtractConfig(target=str(other), data=(str(rows),), store=str(store), top_k=8))
        train(TrainConfig(store=str(store), out=str(run), max_steps=2, step_tokens=256, draft_vocab_size=100))
        export(run, draft, dtype="float32")
        jobs[name] = Job(target=other, draft=draft, prompts=[list(range(3 + i, 43 + i)) for i in range(3)])
    return serve(jobs, folder)


def write_untrained(path: Path, trained_run: Path) -> None:
    """Write a draft like that of the run, with its first weights."""
    trained = read_trained(RunDirectory(trained_run))
    torch.manual_seed(0)
    untrained = TrainedDraft(
        spec=trained.spec,
        weights={name: weight.detach() for name, weight in Eagle3Draft(trained.spec).named_parameters()},
        vocabulary=trained.vocabulary,
        rope=trained.rope,
    )
    write_draft(path, untrained, "float32", Form())


def acceptance_length(requests: Served) -> float:
    accepted = [count for request in requests for count in request["accepted"]]
    return 1 + sum(accepted) / len(accepted)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_draft_of_another_target_is_served_as_it_was_trained(
    name: str, served_targets: dict[str, tuple[Job, Served]]
) -> None:
    equal, positions = agreement(*served_targets[name])
    assert positions >= 200
    assert equal / positions >= 0.99, f"{equal} of {positions}"


def test_vllm_proposes_what_our_own_chain_proposes(served_targets: dict[str, tuple[Job, Served]]) -> None:
    job, requests = served_targets["trained"]
    equal, positions = agreement(job, requests)
    assert positions >= 500
    assert equal / positions >= 0.99, f"{equal} of {positions}"
    assert acceptance_length(requests) > 1.5


def test_an_untrained_draft_is_accepted_no_better_than_chance(served_targets: dict[str, tuple[Job, Served]]) -> None:
    _, requests = served_targets["untrained"]
    assert acceptance_length(requests) == pytest.approx(1.0, abs=0.02)
