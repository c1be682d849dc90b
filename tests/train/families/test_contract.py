"""What every draft family must hold, whoever wrote it. Parametrized over all that are registered."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run as extract
from specx.storage.store import FeatureStore
from specx.tests.conftest import MadeOnce
from specx.train.config import TrainConfig
from specx.train.data.batch import Batch
from specx.train.data.datamodule import FeatureData
from specx.train.data.target_head import read_head
from specx.train.dry_run import forecast
from specx.train.errors import TrainError
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.estimate import EstimateSummary
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.evaluate.prompts import read_prompts
from specx.train.evaluate.results_file import REQUESTS_FILE
from specx.train.export.rope_check import check_rope
from specx.train.export.write import export, read_trained
from specx.train.families.base import DraftFamily, DraftModel, StepContext
from specx.train.families.load import load_draft
from specx.train.families.registry import entries, family
from specx.train.loop.run_directory import RunDirectory
from specx.train.loss.anchors import supervised_anchors
from specx.train.loss.target_distribution import Vocabulary
from specx.train.opening import open_corpus, store_records
from specx.train.pipeline import run as train

STEPS = 40
DRAFTED = 3


@pytest.fixture(scope="module", params=list(entries()))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(method: str, tiny_store: Path, made_once: MadeOnce) -> TrainConfig:
    """A short run, in batches of which several make a step."""
    run = made_once(f"contract/{method}", lambda out: train(settings(method, tiny_store, out)))
    return settings(method, tiny_store, run)


def settings(method: str, store: Path, out: Path) -> TrainConfig:
    given: dict[str, Any] = {"store": str(store), "out": str(out), "method": method, "max_steps": STEPS, "lr": 3e-3}
    given |= {"step_tokens": 2048, "batch_tokens": 1024, "holdout_fraction": 0.0}
    if "draft_vocab_size" in entries()[method].settings.model_fields:
        given["draft_vocab_size"] = 1024
    return TrainConfig.model_validate(given)


@pytest.fixture(scope="module")
def exported(method: str, config: TrainConfig, made_once: MadeOnce) -> Path:
    return made_once(f"contract/{method}-draft", lambda out: export(config.out, out, dtype="float32"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A trained draft, and a batch of the run."""

    family: DraftFamily[Any, Any, Any]
    draft: DraftModel
    vocabulary: torch.Tensor
    settings: Any
    data: FeatureData
    batch: Batch
    context: StepContext
    lm_head: torch.Tensor


@pytest.fixture(scope="module")
def case(config: TrainConfig, exported: Path) -> Case:
    back = load_draft(exported)
    stores = [FeatureStore.open(config.store[0])]
    corpus = open_corpus(stores, store_records(config, stores), back.spec.boundaries)
    data = FeatureData(config, corpus, anchors=back.family.anchors(config.draft))
    ids = back.vocabulary
    head = read_head(stores[0], ids.numpy())
    t2d = torch.zeros(back.spec.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    data.known = t2d.numpy()
    vocabulary = Vocabulary(ids - torch.arange(len(ids)), t2d, head.lm_head_rows.float(), head.transform)
    return Case(
        family=back.family,
        draft=back.draft,
        vocabulary=ids,
        settings=config.draft,
        data=data,
        batch=next(iter(data.train_dataloader())),
        context=StepContext(embed_tokens=head.embed_tokens, vocabulary=vocabulary, dtype=torch.float32),
        lm_head=read_head(stores[0], torch.arange(back.spec.vocab_size).numpy()).lm_head_rows.float(),
    )


def test_the_gradient_is_the_slope_of_the_loss(case: Case) -> None:
    draft = copy.deepcopy(case.draft)
    weights = list(draft.parameters())

    def loss() -> torch.Tensor:
        return case.family.step(draft, case.batch, case.settings, case.context)[0]

    gradient = torch.autograd.grad(loss(), weights)
    length = torch.cat([each.flatten() for each in gradient]).norm()
    assert length > 0
    step = 1e-2
    found = []
    with torch.no_grad():
        for sign in (1, -2):
            for weight, slope in zip(weights, gradient, strict=True):
                weight.add_(slope / length, alpha=sign * step)
            found.append(loss())
    assert float(found[0] - found[1]) / (2 * step) == pytest.approx(float(length), rel=0.03)


def test_anchors_are_drawn_once_and_their_labels_are_those_of_the_step(case: Case) -> None:
    again = next(iter(case.data.train_dataloader()))
    assert case.batch.anchors is not None
    assert torch.equal(again.anchors, case.batch.anchors)
    supervised = supervised_anchors(case.batch, len(case.batch.anchors))
    assert not (case.batch.anchors & ~supervised).any()
    labels = case.family.count_labels(case.batch, case.context.vocabulary.t2d)
    _, counts = case.family.step(case.draft, case.batch, case.settings, case.context)
    assert counts is not None
    assert labels.tolist() == [float(step.labels) for step in counts]
    assert len(counts) == len(case.family.loss_weights(case.settings))
    assert sum(case.family.loss_weights(case.settings)) == pytest.approx(1)


def test_the_losses_of_the_batches_of_a_step_add_up_to_its_mean(case: Case) -> None:
    labels = case.family.count_labels(case.batch, case.context.vocabulary.t2d)
    alone, _ = case.family.step(case.draft, case.batch, case.settings, case.context)
    context = dataclasses.replace(case.context, labels=3 * labels)
    third, _ = case.family.step(case.draft, case.batch, case.settings, context)
    assert third.item() == pytest.approx(alone.item() / 3, rel=1e-5)


def test_the_proposer_drafts_what_the_training_step_predicts(case: Case) -> None:
    batch = dataclasses.replace(case.batch, anchors=supervised_anchors(case.batch, DRAFTED))
    with torch.inference_mode():
        proposed = case.family.predict(case.draft, batch, case.context).proposed
    features = batch.aux_hidden if case.draft.spec.boundaries else batch.last_hidden
    assert features is not None
    T = batch.input_ids.shape[1]
    equal = total = 0
    for row, document in ((0, 0), (0, 1)):
        span = (batch.documents[row] == document).nonzero().flatten()
        start, ids = int(span[0]), batch.input_ids[row, span].tolist()
        proposer = case.family.proposer(case.draft, case.vocabulary, case.context.embed_tokens.float(), case.lm_head)
        for t in range(len(ids) - 1):
            proposer.extend([ids[t + 1]], features[row, span[t : t + 1]].float())
            if not batch.anchors[-1, row, start + t]:
                continue
            drafted = proposer.propose(DRAFTED)
            for k in range(DRAFTED):
                total += 1
                equal += drafted[k] == int(proposed[k, row * T + start + t])
                if drafted[k] != ids[t + 2 + k]:
                    break  # the engine would read another token than the training step from here on
    assert total > 30
    assert equal / total >= 0.99


def test_an_export_read_back_is_the_draft_of_the_run(case: Case, config: TrainConfig) -> None:
    trained = read_trained(RunDirectory(config.out))
    weights = case.draft.state_dict()
    assert weights.keys() == trained.weights.keys() == case.family.weight_shapes(case.draft.spec).keys()
    for name, weight in trained.weights.items():
        assert torch.equal(weights[name], weight), name
    assert torch.equal(case.vocabulary, trained.vocabulary)
    known = {key: value for key, value in case.draft.spec.model_dump().items() if value not in ("", 0)}
    assert known == {key: value for key, value in trained.spec.model_dump().items() if key in known}


def test_every_engine_that_a_family_names_serves_it_in_a_test(method: str) -> None:
    from specx.tests.train.evaluate.test_served import VARIANTS

    served = {TrainConfig.model_validate({"store": "s", "out": "o"} | given).method for given in VARIANTS.values()}
    assert (method in served) == ("vllm" in family(method).checkpoint.engines)


def test_a_dry_run_predicts_products_and_memory_within_a_factor_of_two(case: Case, config: TrainConfig) -> None:
    predicted = forecast(config)
    shapes = case.family.weight_shapes(case.draft.spec)
    assert predicted.parameters == sum(torch.Size(shape).numel() for shape in shapes.values())
    anchors = supervised_anchors(case.batch, 1)
    share = float(anchors.sum()) / case.batch.num_tokens
    cost = case.family.cost(case.draft.spec, case.settings, float(case.batch.num_tokens), share)
    # In float32 a CPU's products are oneDNN's, which are not counted.
    context = dataclasses.replace(case.context, dtype=torch.bfloat16, with_metrics=False)
    with FlopCounterMode(display=False) as counted:
        case.family.step(case.draft, case.batch, case.settings, context)[0].backward()
    case.draft.zero_grad(set_to_none=True)
    assert 1 / 2 < 3 * cost.forward_flops / counted.get_total_flops() < 2
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        loss, _ = case.family.step(case.draft, case.batch, case.settings, case.context)
    assert 1 / 2 < 4 * cost.activation_numbers / sum(kept.values()) < 2
    del loss


def test_the_estimate_is_what_our_own_chain_finds(
    exported: Path, method: str, target: Path, regen: Path, tmp_path: Path
) -> None:
    decode = {"draft": str(exported), "target": str(target), "num_speculative_tokens": DRAFTED}
    data = {"data": (str(regen / "dev.parquet"),), "limit": 10, "max_new_tokens": 40}
    evaluate(EvaluateConfig(**decode, **data, engine="transformers", out=str(tmp_path / "chain")))
    requests = pq.read_table(tmp_path / "chain" / REQUESTS_FILE).to_pylist()
    prompts = read_prompts(EvaluateConfig(**decode, **data))
    rows = [
        {
            "input_ids": prompts[each["prompt"]].ids + each["output_ids"],
            "loss_mask": [0] * each["prompt_length"] + [1] * len(each["output_ids"]),
        }
        for each in requests
        if each["drafted"]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "greedy.parquet")
    store = str(tmp_path / "store")
    extract(ExtractConfig(target=str(target), data=(str(tmp_path / "greedy.parquet"),), store=store, dtype="float32"))
    summary = evaluate(EvaluateConfig(draft=str(exported), store=store, split="all", num_speculative_tokens=DRAFTED))
    assert isinstance(summary, EstimateSummary)
    accepted = [count for each in requests if each["drafted"] for count in each["accepted"]]
    found = 1 + sum(accepted) / len(accepted)
    assert found > 1.05, "a draft that is accepted nothing shows nothing"
    # The last verifications of an answer are left out of the estimate.
    assert summary.acceptance_length == pytest.approx(found, rel=0.06)


def test_angles_are_the_target_s_or_there_are_none(
    method: str, config: TrainConfig, exported: Path, target: Path
) -> None:
    if not family(method).has_rotary:
        with pytest.raises(TrainError, match="no rotary position embedding"):
            check_rope(target, exported)
        return
    assert check_rope(target, exported).is_equal
    assert check_rope(target, config.out).is_equal


def test_a_run_is_drawn(config: TrainConfig, specx: Callable[..., Any], tmp_path: Path) -> None:
    result = specx("report", config.out, "--out", tmp_path / "report.html")
    assert result.returncode == 0, result.stderr
