"""The study of ropes: that its texts, ropes and comparisons are the ones it says they are."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run as extract
from specx.train.config import TrainConfig
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.estimate import estimate
from specx.train.export.rope_check import check_rope
from specx.train.export.write import export
from specx.train.pipeline import run as train

from .rope import QUICK, require_same, verifications
from .rope_drafts import SERVED, Job, correlations, drafts, measure, rope_blocks, store_with_rope
from .rope_page import AS_TRAINED, CONTROLS, SERVED_BY_TARGET, differences, plot, tables
from .rope_texts import BUCKETS, conversations, described, pieces, questions, read_turns

SETTINGS = {"max_steps": 3, "step_tokens": 2048, "ttt_steps": 3, "draft_vocab_size": 512, "holdout_fraction": 0.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path) -> Path:
    """A store of 16 answers."""
    path = tmp_path_factory.mktemp("store") / "store"
    data = (str(regen / "train.parquet"),)
    extract(ExtractConfig(target=str(target), data=data, store=str(path), limit=16))
    return path


def test_short_conversations_have_the_tokens_and_labels_of_the_long_ones(target: Path, regen: Path) -> None:
    system, turns = read_turns(regen / "dev.parquet", target)
    long = conversations(system, turns, 2048)
    short = pieces(long, 512)
    assert {len(row["input_ids"]) for row in long} == {2048}
    assert {len(row["input_ids"]) for row in short} == {512}
    for key in ("input_ids", "loss_mask"):
        assert [each for row in short for each in row[key]] == [each for row in long for each in row[key]]
    body = [index for row in long for index in row["input_ids"][len(system) :]]
    assert body == [index for each in turns for index in (*each.question, *each.answer)][: len(body)]


def test_questions_are_asked_within_their_bucket_and_only_their_answers_count(target: Path, regen: Path) -> None:
    system, turns = read_turns(regen / "dev.parquet", target)
    rows = questions(system, turns, 5, 3960, seed=0)
    assert len(rows) == 5 * len(BUCKETS)
    answers = {each.answer for each in turns}
    for number, row in enumerate(rows):
        first = row["loss_mask"].index(1)
        low, high = BUCKETS[number // 5]
        assert low <= first < min(high, 3960)
        assert all(row["loss_mask"][first:])
        assert tuple(row["input_ids"][first:]) in answers
        assert tuple(row["input_ids"][: len(system)]) == system


def test_supervised_tokens_are_counted_where_they_stand() -> None:
    ids = [*range(126), 1, 2, 3, 4, 1, 2, 3, 4]
    found = described([{"input_ids": ids, "loss_mask": [0] * 126 + [1] * 8}])
    assert found["0-128"] == {"tokens": 2, "repeated": 0.0}
    # Only the last four stood there before.
    assert found["128-512"] == {"tokens": 6, "repeated": round(1 / 6, 3)}
    assert found["512-1024"]["tokens"] == 0


def test_rope_is_the_one_trained_and_the_one_served(tmp_path: Path, store: Path, target: Path) -> None:
    blocks = rope_blocks(target)
    store_with_rope(store, tmp_path / "stores" / "questions", blocks["yarn"])
    store_with_rope(store, tmp_path / "stores" / "plain-10000-512", blocks["plain-10000"])
    job = Job(rope="plain-10000", length=512, seed=0)
    rows = measure(job, tmp_path, target, SETTINGS)
    assert [row["served"] for row in rows] == list(SERVED["plain-10000"])
    checkpoint = torch.load(tmp_path / "runs" / job.name / "checkpoints" / "last.ckpt", weights_only=True)
    head_dim = 32
    plain = 1.0 / 10_000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    torch.testing.assert_close(checkpoint["rope"]["inv_freq"], plain)
    assert checkpoint["rope"]["attention_scaling"] == 1.0
    assert not check_rope(target, drafts(tmp_path, job, "plain-10000")).is_equal
    assert check_rope(target, drafts(tmp_path, job, "yarn")).is_equal
    unscaled = check_rope(target, drafts(tmp_path, job, "yarn-unscaled"))
    assert unscaled.max_angle_error < 1e-2
    assert unscaled.concentration["vllm"] == 1.0
    assert (drafts(tmp_path, job, "yarn") / "model.safetensors").read_bytes() == (
        drafts(tmp_path, job, "plain-10000") / "model.safetensors"
    ).read_bytes()
    assert len({row["acceptance_length"] for row in rows}) > 1
    # What is measured is not measured again.
    assert measure(job, tmp_path, target, {}) == rows


def test_study_of_the_targets_rope_is_plain_specx(tmp_path: Path, store: Path, target: Path) -> None:
    block = rope_blocks(target)["yarn"]
    for name in ("questions", "yarn-512"):
        store_with_rope(store, tmp_path / "stores" / name, block)
    row = measure(Job(rope="yarn", length=512, seed=0), tmp_path, target, SETTINGS)[0]
    train(TrainConfig(store=(str(store),), out=str(tmp_path / "run"), seed=0, **SETTINGS))
    export(tmp_path / "run", tmp_path / "draft")
    found = estimate(EvaluateConfig(draft=str(tmp_path / "draft"), store=str(store), split="all"))
    assert (row["acceptance_length"], row["by_context"]) == (found.acceptance_length, found.by_context)


def test_scores_of_ropes_correlate_as_those_of_random_heads_do(target: Path) -> None:
    found = correlations(target)
    # Of 4096 pairs of random q and k, with the frequencies written out.
    plain = 150_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ramp = (torch.arange(32) - 8.0928) / (17.3980 - 8.0928)
    yarn = plain * (1 - ramp.clamp(0, 1) * 31 / 32)
    q, k = torch.randn(2, 4096, 32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = torch.view_as_complex(q) * torch.view_as_complex(k).conj()
    scores = [(product * torch.exp(1024j * each)).real.sum(1) for each in (plain, yarn)]
    expected = float(torch.corrcoef(torch.stack(scores))[0, 1])
    assert found["gpt-oss"]["plain-150000"]["1024"] == pytest.approx(expected, abs=0.03)


def made_up(values: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """Results where only these are not 2."""
    names = [f"{low}-{high}" for low, high in BUCKETS]
    rows = [
        {
            "length": 512,
            "trained": way[0],
            "served": way[1],
            "seed": seed,
            "acceptance_length": value,
            "by_context": dict.fromkeys(names, value),
        }
        for way in AS_TRAINED + SERVED_BY_TARGET + CONTROLS
        for seed, value in reversed(list(enumerate(values.get(way, [2.0, 2.0]))))
    ]
    texts = {name: {"tokens": 1, "repeated": 0.0} for name in names}
    return {
        "settings": {"lengths": [512]},
        "rows": rows,
        "vllm": [],
        "texts": texts,
        "correlations": {"tiny": {"plain-10000": {"16": 0.5}}},
    }


def test_seeds_are_compared_with_themselves() -> None:
    results = made_up({("yarn", "yarn"): [2.0, 3.0], ("plain-10000", "plain-10000"): [1.0, 3.0]})
    mean, least, most = differences(results, 512, ("plain-10000", "plain-10000"), ("yarn", "yarn"))["512-1024"]
    assert (mean, least, most) == pytest.approx((-25.0, -50.0, 0.0))
    assert "| 512 | plain, theta 10000 | as trained | -25.0 (-50.0 to +0.0) |" in tables(results)


def test_every_way_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot: make study-rope installs it")
    plot(made_up({}), tmp_path / "yarn.svg")
    text = (tmp_path / "yarn.svg").read_text()
    ways = len(AS_TRAINED) - 1 + len(SERVED_BY_TARGET) + 3
    assert text.count("LineCollection") >= ways


def test_verifications_are_counted_by_their_context(tmp_path: Path) -> None:
    # Verified at contexts 126, 129 and 130.
    rows = [{"prompt_length": 125, "accepted": [2, 0, 3]}, {"prompt_length": 125, "accepted": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    found = verifications(tmp_path / "requests.parquet")
    assert (found["0-128"], found["128-512"], sum(found.values())) == (1, 2, 3)


def test_a_study_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    require_same(QUICK, tmp_path)
    require_same(QUICK, tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 1}))
    with pytest.raises(SystemExit, match="other settings"):
        require_same(QUICK, tmp_path)
