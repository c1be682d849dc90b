"""What is stored of a target is what transformers computes, bit for bit.

Shapes: T tokens, L boundaries, H hidden size, V vocabulary, K logits kept per token.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import ExtractSummary, run
from specx.hub import TargetError
from specx.storage.catalog.rejects import read_rejects
from specx.storage.reader import FeatureReader
from specx.storage.schema import Array, SequenceFeatures
from specx.storage.store import FeatureStore

SEQUENCES = 20
RANDOM_SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RANDOM_TARGETS = {
    "LlamaForCausalLM": LlamaConfig(**RANDOM_SHAPE),
    "tied LlamaForCausalLM": LlamaConfig(**RANDOM_SHAPE, tie_word_embeddings=True),
    "Qwen3ForCausalLM": Qwen3Config(**RANDOM_SHAPE, head_dim=16),
    "Phi3ForCausalLM": Phi3Config(**RANDOM_SHAPE),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(
        **RANDOM_SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What transformers computes for one sequence, in the type the model runs in."""

    hidden_states: tuple[torch.Tensor, ...]
    """(T, H) each; the last one is behind the final norm."""
    logits: torch.Tensor
    """(T, V)"""


@pytest.fixture(scope="module")
def rows(regen: Path) -> list[dict[str, Any]]:
    table = pq.read_table(regen / "train.parquet", columns=["input_ids", "loss_mask"])
    return table.slice(0, SEQUENCES).to_pylist()


@pytest.fixture(scope="module")
def store(target: Path, regen: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The first 20 answers, in the checkpoint's bfloat16 and in several parts."""
    path = tmp_path_factory.mktemp("features") / "store"
    extract(target, regen / "train.parquet", path, limit=SEQUENCES, tokens_per_part=1500)
    return FeatureStore.open(path)


@pytest.fixture(scope="module")
def stored(store: FeatureStore) -> list[SequenceFeatures]:
    return features(store)


@pytest.fixture(scope="module")
def references(target: Path, rows: list[dict[str, Any]]) -> list[Reference]:
    return reference(target, [row["input_ids"] for row in rows], torch.bfloat16)


def extract(target: Path, data: Path, store: Path, **settings: Any) -> ExtractSummary:
    return run(ExtractConfig(target=str(target), data=(str(data),), store=str(store), **settings))


def features(store: FeatureStore) -> list[SequenceFeatures]:
    reader = FeatureReader(store)
    return [reader.features(sequence) for sequence in range(len(reader.catalogue))]


def reference(target: Path, sequences: list[list[int]], dtype: torch.dtype) -> list[Reference]:
    """Run transformers as its users do: the whole model, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, local_files_only=True).eval()
    found = []
    with torch.inference_mode():
        for ids in sequences:
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            hidden_states = tuple(states[0] for states in output.hidden_states)
            found.append(Reference(hidden_states=hidden_states, logits=output.logits[0]))
    return found


def bits(values: torch.Tensor) -> Array:
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


def bfloat16(stored: Array) -> torch.Tensor:
    return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)


def write_rows(path: Path, sequences: list[list[int]]) -> Path:
    rows = ({"input_ids": ids, "loss_mask": [0] + [1] * (len(ids) - 1)} for ids in sequences)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_random(config: PretrainedConfig, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)
    return directory


def random_sequences(lengths: tuple[int, ...], vocab_size: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(vocab_size, size=length).tolist() for length in lengths]


def assert_same(found: SequenceFeatures, expected: SequenceFeatures) -> None:
    for name, values in expected.arrays().items():
        assert found.arrays()[name].tobytes() == values.tobytes(), name


def test_ids_and_mask_are_stored_as_given(stored: list[SequenceFeatures], rows: list[dict[str, Any]]) -> None:
    for found, row in zip(stored, rows, strict=True):
        assert found.input_ids.tolist() == row["input_ids"]
        assert found.loss_mask.tolist() == row["loss_mask"]


def test_boundaries_are_the_hidden_states_of_transformers(
    store: FeatureStore, stored: list[SequenceFeatures], references: list[Reference]
) -> None:
    assert store.info.boundaries == (1, 3, 5)
    for found, expected in zip(stored, references, strict=True):
        for column, boundary in enumerate(store.info.boundaries):
            assert np.array_equal(found.aux_hidden[:, column], bits(expected.hidden_states[boundary]))
        assert np.array_equal(found.last_hidden, bits(expected.hidden_states[-1]))


def test_argmax_is_that_of_transformers_on_every_token(
    stored: list[SequenceFeatures], references: list[Reference]
) -> None:
    for found, expected in zip(stored, references, strict=True):
        assert np.array_equal(found.argmax, expected.logits.argmax(-1).numpy())


def test_stored_head_on_the_stored_last_hidden_gives_the_argmax_of_transformers(
    store: FeatureStore, stored: list[SequenceFeatures], references: list[Reference]
) -> None:
    lm_head = load_file(store.target_directory / "head.safetensors")["lm_head"]
    assert lm_head.dtype == torch.bfloat16
    for found, expected in zip(stored, references, strict=True):
        logits = nn.functional.linear(bfloat16(found.last_hidden), lm_head)
        assert torch.equal(logits.argmax(-1), expected.logits.argmax(-1))
        torch.testing.assert_close(logits, expected.logits, rtol=2**-8, atol=2**-8)


def test_top_logits_are_those_of_transformers(stored: list[SequenceFeatures], references: list[Reference]) -> None:
    for found, expected in zip(stored, references, strict=True):
        logits = expected.logits.float()
        lse = torch.from_numpy(found.lse)
        torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-6, atol=1e-6)
        ids = torch.from_numpy(found.topk_ids.astype(np.int64))
        assert all(len(set(row)) == 128 for row in ids.tolist())
        kept = logits.gather(1, ids)
        assert torch.equal(kept, logits.topk(128).values)
        logprob = torch.from_numpy(found.topk_logprob)
        assert logprob.dtype == torch.float16
        torch.testing.assert_close(logprob, (kept - lse[:, None]).half(), rtol=0, atol=1e-6)
        assert (logprob.float().exp().sum(-1) <= 1 + 1e-3).all()


def test_features_of_a_sequence_do_not_depend_on_the_other_data(
    target: Path, tmp_path: Path, stored: list[SequenceFeatures], rows: list[dict[str, Any]]
) -> None:
    chosen = [7, 3, 11]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(rows[index]) + "\n" for index in chosen))
    extract(target, data, tmp_path / "store")
    for index, found in zip(chosen, features(FeatureStore.open(tmp_path / "store")), strict=True):
        assert_same(found, stored[index])


def test_features_do_not_depend_on_the_codec(
    target: Path, regen: Path, tmp_path: Path, stored: list[SequenceFeatures]
) -> None:
    extract(target, regen / "train.parquet", tmp_path / "store", limit=3, codec="none")
    for found, expected in zip(features(FeatureStore.open(tmp_path / "store")), stored, strict=False):
        assert_same(found, expected)


def test_float32_run_keeps_its_hidden_states_rounded_to_bfloat16(
    target: Path, regen: Path, tmp_path: Path, rows: list[dict[str, Any]], stored: list[SequenceFeatures]
) -> None:
    extract(target, regen / "train.parquet", tmp_path / "store", limit=4, dtype="float32")
    store = FeatureStore.open(tmp_path / "store")
    assert store.info.compute_dtype == "float32"
    found = features(store)
    expected = reference(target, [row["input_ids"] for row in rows[:4]], torch.float32)
    for sequence, states in zip(found, expected, strict=True):
        for column, boundary in enumerate(store.info.boundaries):
            assert np.array_equal(sequence.aux_hidden[:, column], bits(states.hidden_states[boundary]))
        assert np.array_equal(sequence.last_hidden, bits(states.hidden_states[-1]))
        assert np.array_equal(sequence.argmax, states.logits.argmax(-1).numpy())
    assert not np.array_equal(found[0].aux_hidden, stored[0].aux_hidden)


@pytest.mark.parametrize("name", RANDOM_TARGETS)
def test_every_known_architecture_gives_the_states_of_transformers(name: str, tmp_path: Path) -> None:
    target = save_random(RANDOM_TARGETS[name], tmp_path / "target")
    sequences = random_sequences((40, 7, 2, 120), vocab_size=256)
    data = write_rows(tmp_path / "rows.jsonl", sequences)
    summary = extract(target, data, tmp_path / "store", top_k=16)
    assert (summary.sequences, summary.tokens, summary.rejected) == (4, 169, 0)
    store = FeatureStore.open(tmp_path / "store")
    assert store.info.target.architecture == name.split()[-1]
    expected = reference(target, sequences, torch.bfloat16)
    for found, states in zip(features(store), expected, strict=True):
        for column, boundary in enumerate((1, 2, 3)):
            assert np.array_equal(found.aux_hidden[:, column], bits(states.hidden_states[boundary]))
        assert np.array_equal(found.last_hidden, bits(states.hidden_states[-1]))
        assert np.array_equal(found.argmax, states.logits.argmax(-1).numpy())


def test_logits_of_a_long_sequence_stay_in_place(tmp_path: Path) -> None:
    target = save_random(RANDOM_TARGETS["LlamaForCausalLM"], tmp_path / "target", torch.float32)
    (ids,) = sequences = random_sequences((1500,), vocab_size=256)
    extract(target, write_rows(tmp_path / "rows.jsonl", sequences), tmp_path / "store", top_k=256)
    (found,) = features(FeatureStore.open(tmp_path / "store"))
    (expected,) = reference(target, [ids], torch.float32)
    logprob = torch.empty(1500, 256).scatter(
        1, torch.from_numpy(found.topk_ids.astype(np.int64)), torch.from_numpy(found.topk_logprob).float()
    )
    torch.testing.assert_close(logprob, expected.logits.log_softmax(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(found.lse), expected.logits.logsumexp(-1))


def test_sequence_that_meets_a_weight_that_is_nan_is_rejected_and_no_other(
    target: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    spoilt = Path(shutil.copytree(target, tmp_path / "target"))
    tensors = load_file(spoilt / "model.safetensors")
    poison = 77
    tensors["model.embed_tokens.weight"][poison, 5] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    sound = [ids for ids in (row["input_ids"] for row in rows) if poison not in ids][:2]
    data = write_rows(tmp_path / "rows.jsonl", [sound[0], [*sound[0][:20], poison], sound[1], [poison, 1]])
    summary = extract(spoilt, data, tmp_path / "store")
    assert (summary.sequences, summary.rejected) == (2, 2)
    store = FeatureStore.open(tmp_path / "store")
    rejects = read_rejects(store.place)
    assert [(reject.row, reject.reason) for reject in rejects] == [(1, "not_finite"), (3, "not_finite")]
    assert "not finite in torch.bfloat16" in rejects[0].detail
    assert [found.input_ids.tolist() for found in features(store)] == sound
    assert all(np.isfinite(found.lse).all() for found in features(store))


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_target_without_one_of_its_weights_is_refused(target: Path, tmp_path: Path, change: str) -> None:
    partial = Path(shutil.copytree(target, tmp_path / "target"))
    tensors = load_file(partial / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    weight = tensors.pop(name)
    if change == "misshapen":
        tensors[name] = weight[:64].contiguous()
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=name):
        extract(partial, write_rows(tmp_path / "rows.jsonl", [[5, 6, 7]]), tmp_path / "store")
    assert len(FeatureStore.open(tmp_path / "store").catalogue()) == 0
