"""The vLLM engine, on a CPU and in float32, writes the store that the transformers engine writes.

Three runs of vLLM serve all tests: ``roomy`` as it is by default, ``cramped`` with so little room that sequences are
cut into chunks and thrown out half done, and ``dense``, another architecture with a weight that is not a number.

Shapes: T tokens, L boundaries, H hidden size.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import dataset_info, run
from specx.extract.target import open_target
from specx.storage.catalog.rejects import read_rejects
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import Array, SequenceFeatures
from specx.storage.store import FeatureStore

pytestmark = pytest.mark.long

ANSWERS = 200
SHORT = 1000
CRAMPED_LENGTH = 600
TARGET_LENGTH = 4096
CRAMPED = {
    "max_num_batched_tokens": 64,
    # Long sequences take turns instead of running one after another, and nobody sees to it that all fit.
    "long_prefill_token_threshold": 16,
    "scheduler_reserve_full_isl": False,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 40,
    "disable_log_stats": False,
}
POISON = 77
DENSE = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.05,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of vLLM, in a process of its own."""

    process: subprocess.Popen[str]
    folder: Path

    def wait(self) -> None:
        _, stderr = self.process.communicate(timeout=500)
        assert self.process.returncode == 0, stderr[-3000:]

    @property
    def store(self) -> FeatureStore:
        return FeatureStore.open(self.folder / "store")

    @property
    def told(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result

    def recorded(self) -> dict[int, torch.Tensor]:
        """Return the hidden states (T, L + 1, H) float32 of the first rows, before they were rounded."""
        return {int(row): states for row, states in load_file(self.folder / "recording").items()}


def start(folder: Path, settings: dict[str, Any], *, record: int, version: str | None = None) -> Job:
    config = ExtractConfig(**settings, store=str(folder / "store"), engine="vllm", dtype="float32")
    for name in ("store", "alone"):
        FeatureStore.create(folder / name, dataset_info(config, open_target(config.target)))
    job = {
        "settings": config.model_dump(),
        "record": record,
        "recording": str(folder / "recording"),
        "alone": str(folder / "alone"),
        "version": version,
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, Path(__file__).parent / "recorded.py", folder / "job.json", folder / "result.json"]
    pipe = subprocess.PIPE
    return Job(process=subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True), folder=folder)


def write_rows(path: Path, sequences: list[tuple[list[int], list[int], str]]) -> Path:
    ids, masks, categories = zip(*sequences, strict=True)
    pq.write_table(pa.table({"input_ids": ids, "loss_mask": masks, "category": categories}), path)
    return path


def made_up(lengths: list[int], vocab_size: int, category: str) -> list[tuple[list[int], list[int], str]]:
    generator = np.random.default_rng(0)
    return [
        (generator.integers(vocab_size, size=length).tolist(), [0] + [1] * (length - 1), category) for length in lengths
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Beside runs of vLLM on few cores, threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(regen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers, many short sequences, one as long as ``cramped`` takes, and one as long as the target takes."""
    table = pq.read_table(regen / "train.parquet", columns=["input_ids", "loss_mask", "category"]).slice(0, ANSWERS)
    answers = [tuple(row.values()) for row in table.to_pylist()]
    short = np.random.default_rng(1).integers(2, 13, size=SHORT).tolist()
    long = [*made_up(short, 2048, "short"), *made_up([CRAMPED_LENGTH, TARGET_LENGTH], 2048, "long")]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", [*answers, *long])


@pytest.fixture(scope="module")
def dense_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32, in which the embedding of one token is not a number."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DENSE, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON, 5] = float("nan")
    path = tmp_path_factory.mktemp("dense")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 sequences of 2 to 700 tokens; about a third hold the token that is not a number."""
    lengths = np.random.default_rng(2).integers(2, 150, size=78).tolist()
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", made_up([*lengths, 700, 600], 256, "made up"))


@pytest.fixture(scope="module")
def jobs(
    target: Path, rows: Path, dense_target: Path, dense_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Job]]:
    """All runs of vLLM, begun at once: much of each is loading."""
    made = tmp_path_factory.mktemp
    settings = {"target": str(target), "data": [str(rows)], "tokens_per_part": 10_000}
    cramped = {"limit": ANSWERS + SHORT + 1, "max_length": CRAMPED_LENGTH, "engine_options": CRAMPED}
    begun = {
        "roomy": start(made("roomy"), settings, record=ANSWERS),
        "cramped": start(made("cramped"), settings | cramped, record=0, version="9.8.7"),
        "dense": start(made("llama"), {"target": str(dense_target), "data": [str(dense_rows)]}, record=80),
    }
    yield begun
    for job in begun.values():
        job.process.kill()
        job.process.communicate()


@pytest.fixture(scope="module")
def expected(jobs: dict[str, Job], target: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """All rows from the transformers engine."""
    return by_transformers(target, rows, tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="module")
def dense_expected(
    jobs: dict[str, Job], dense_target: Path, dense_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    return by_transformers(dense_target, dense_rows, tmp_path_factory.mktemp("expected"))


def by_transformers(target: Path, rows: Path, folder: Path) -> FeatureStore:
    config = ExtractConfig(target=str(target), data=(str(rows),), store=str(folder / "store"), dtype="float32")
    run(config.model_copy(update={"engine": "transformers"}))
    return FeatureStore.open(folder / "store")


@pytest.fixture(scope="module")
def roomy(jobs: dict[str, Job], expected: FeatureStore) -> Job:
    jobs["roomy"].wait()
    return jobs["roomy"]


@pytest.fixture(scope="module")
def cramped(jobs: dict[str, Job], expected: FeatureStore) -> Job:
    jobs["cramped"].wait()
    return jobs["cramped"]


@pytest.fixture(scope="module")
def dense(jobs: dict[str, Job], dense_expected: FeatureStore) -> Job:
    jobs["dense"].wait()
    return jobs["dense"]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One sequence as a store has it."""

    origin: tuple[str, int, str]
    features: SequenceFeatures


def contents(store: FeatureStore) -> dict[bytes, Stored]:
    reader = FeatureReader(store)
    sequences = reader.catalogue
    origins = zip(sequences.source, map(int, sequences.row), sequences.category, strict=True)
    return {
        bytes(sequences.ids[number]): Stored(origin=origin, features=reader.features(number))
        for number, origin in enumerate(origins)
    }


def bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def steps_apart(found: Array, expected: Array) -> Array:
    """Return how many bfloat16 values lie between two, both given as bits."""
    signed = [
        np.where(bits & 0x8000, 0x8000 - bits.astype(np.int32), bits.astype(np.int32)) for bits in (found, expected)
    ]
    return np.abs(signed[0] - signed[1])


def assert_same_top(found: SequenceFeatures, expected: SequenceFeatures) -> None:
    """Same ids at every rank, but for those that float16 logprobs do not tell apart."""
    # A step of float16, and what the log-sum-exp of float32 logits is off by.
    tolerance = np.spacing(np.abs(expected.topk_logprob)).astype(np.float32) + 2e-5
    difference = np.abs(found.topk_logprob.astype(np.float32) - expected.topk_logprob.astype(np.float32))
    assert (difference <= tolerance).all()
    for token in np.flatnonzero((found.topk_ids != expected.topk_ids).any(1)):
        logprobs = dict(zip(expected.topk_ids[token].tolist(), expected.topk_logprob[token].tolist(), strict=True))
        for rank in np.flatnonzero(found.topk_ids[token] != expected.topk_ids[token]):
            # One that is not there lost its tie for the last rank.
            other = logprobs.get(int(found.topk_ids[token, rank]), float(expected.topk_logprob[token, -1]))
            assert abs(other - float(found.topk_logprob[token, rank])) <= 2 * tolerance[token, rank]


def assert_same(found: Mapping[bytes, Stored], expected: Mapping[bytes, Stored]) -> None:
    """Same sequences from the same rows; hidden states the same but for the rounding of float32."""
    assert found.keys() == expected.keys()
    values = different = 0
    for identifier, other in expected.items():
        mine = found[identifier]
        assert mine.origin == other.origin
        for name in ("input_ids", "loss_mask", "argmax"):
            assert np.array_equal(getattr(mine.features, name), getattr(other.features, name)), (name, other.origin)
        assert np.abs(mine.features.lse - other.features.lse).max() < 1e-4
        assert_same_top(mine.features, other.features)
        for name in ("aux_hidden", "last_hidden"):
            bits, expected_bits = getattr(mine.features, name), getattr(other.features, name)
            steps = steps_apart(bits, expected_bits)
            # Neighbours, or so near to zero that the float32 of the token's largest value has no digits there.
            difference = np.abs(bfloat16(bits) - bfloat16(expected_bits))
            largest = np.abs(bfloat16(expected_bits)).max(-1, keepdims=True)
            assert ((steps <= 1) | (difference <= 1e-5 * largest)).all(), (name, other.origin)
            values, different = values + steps.size, different + np.count_nonzero(steps)
    assert different < 1e-3 * values


def assert_close(recorded: dict[int, torch.Tensor], target: Path, rows: Path, boundaries: tuple[int, ...]) -> None:
    """Float32 hidden states are those of transformers within 1e-5, over a sequence and at its worst value."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True).eval()
    sequences = pq.read_table(rows).column("input_ids").to_pylist()
    for row, found in recorded.items():
        with torch.inference_mode():
            states = model(torch.tensor([sequences[row]]), output_hidden_states=True).hidden_states
        for column, boundary in enumerate((*boundaries, -1)):
            expected, difference = states[boundary][0], found[:, column] - states[boundary][0]
            assert difference.norm() < 1e-5 * expected.norm(), (row, boundary)
            assert difference.abs().max() < 1e-5 * expected.abs().max(), (row, boundary)


def test_hidden_states_are_those_of_transformers_before_they_are_rounded(roomy: Job, target: Path, rows: Path) -> None:
    recorded = roomy.recorded()
    assert sorted(recorded) == list(range(ANSWERS))
    assert_close(recorded, target, rows, (1, 3, 5))


def test_store_is_the_one_that_transformers_writes(roomy: Job, expected: FeatureStore) -> None:
    assert_same(contents(roomy.store), contents(expected))
    assert len(contents(expected)) == roomy.told["sequences"] == ANSWERS + SHORT + 2
    assert roomy.told["rejects"] == roomy.told["warnings"] == []
    assert verify(roomy.store).problems == []


def test_a_sequence_alone_is_stored_whole(roomy: Job, expected: FeatureStore) -> None:
    assert roomy.told["alone"] == 1
    first = {identifier: each for identifier, each in contents(expected).items() if each.origin[1] == 0}
    assert_same(contents(FeatureStore.open(roomy.folder / "alone")), first)


def test_sequences_in_chunks_and_thrown_out_half_done_are_stored_as_if_undisturbed(
    cramped: Job, expected: FeatureStore
) -> None:
    assert cramped.told["preemptions"] >= 10
    short_enough = {
        identifier: each
        for identifier, each in contents(expected).items()
        if len(each.features.input_ids) <= CRAMPED_LENGTH
    }
    lengths = [len(each.features.input_ids) for each in short_enough.values()]
    assert max(lengths) == CRAMPED_LENGTH
    assert sum(length > CRAMPED["max_num_batched_tokens"] for length in lengths) > ANSWERS / 2
    assert len(lengths) == cramped.told["sequences"] == ANSWERS + SHORT + 1
    assert_same(contents(cramped.store), short_enough)


def test_version_that_was_not_tested_is_named_in_a_warning(cramped: Job) -> None:
    (line,) = cramped.told["warnings"]
    assert line.startswith("vLLM 9.8.7 is not among the versions this was run against (0.32)")


def test_another_architecture_gives_the_states_of_transformers(
    dense: Job, dense_expected: FeatureStore, dense_target: Path, dense_rows: Path
) -> None:
    sound = {row: states for row, states in dense.recorded().items() if states.isfinite().all()}
    assert len(sound) > 40
    assert_close(sound, dense_target, dense_rows, (1, 3, 5))
    assert_same(contents(dense.store), contents(dense_expected))


def test_exactly_the_sequences_that_meet_a_nan_are_rejected(
    dense: Job, dense_expected: FeatureStore, dense_rows: Path
) -> None:
    sequences = pq.read_table(dense_rows).column("input_ids").to_pylist()
    poisoned = [row for row, ids in enumerate(sequences) if POISON in ids]
    assert 10 < len(poisoned) < 60
    rejects = sorted(dense.told["rejects"], key=lambda reject: reject["row"])
    assert [(reject["row"], reject["reason"]) for reject in rejects] == [(row, "not_finite") for row in poisoned]
    assert rejects == [reject.model_dump() for reject in read_rejects(dense_expected.place)]
    recorded = [reject.row for record in dense.store.records.values() for reject in record.rejected]
    assert sorted(recorded) == poisoned


def test_two_workers_that_share_each_layer_write_the_store_of_one(
    specx: Callable[..., subprocess.CompletedProcess[str]],
    target: Path,
    rows: Path,
    expected: FeatureStore,
    tmp_path: Path,
) -> None:
    options = ["--engine", "vllm", "--dtype", "float32", "--tensor-parallel", "2", "--limit", "20"]
    result = specx("extract", "--target", target, "--data", rows, "--store", tmp_path / "store", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    first = {identifier: each for identifier, each in contents(expected).items() if each.origin[1] < 20}
    assert len(first) == 20
    assert_same(contents(FeatureStore.open(tmp_path / "store")), first)


def test_requests_that_cannot_be_what_vllm_was_given_are_refused_in_one_line(roomy: Job) -> None:
    complaints = roomy.told["complaints"]
    messages = {
        "another token": "rows: row 4: the hidden states give token ",
        "too few": "rows: row 4: vLLM kept 2 hidden states of 3. ",
        "other ids": "rows: row 4: vLLM ran other token ids than it was given. ",
    }
    assert complaints.keys() == {*messages, "no head"}
    for name, message in messages.items():
        assert complaints[name].startswith(message)
        assert complaints[name].endswith("report this with the version of vLLM, or use --engine transformers.")
        assert "\n" not in complaints[name]


def test_model_without_a_head_is_named_with_the_version_of_vllm(roomy: Job) -> None:
    assert roomy.told["complaints"]["no head"].startswith("vLLM 0.32.0: its SimpleNamespace has no compute_logits")
