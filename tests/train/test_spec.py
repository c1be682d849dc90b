"""From a target's config to a draft's."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig, LlamaConfig, Phi3Config, Qwen3MoeConfig

from specx.train.config import TrainConfig
from specx.train.errors import TrainError
from specx.train.spec import DraftSpec, draft_spec, load_spec, save_spec

GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 2048,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
GPT_OSS_ON_THE_HUB = {
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


def derived(folder: Path, config: Any, architecture: str, **settings: Any) -> DraftSpec:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return draft_spec(TrainConfig(store="store", out="out", **settings), folder, (2, 4, 5))


def test_a_dense_target_gives_its_own_geometry(tmp_path: Path) -> None:
    spec = derived(tmp_path, LlamaConfig(**GEOMETRY, rope_parameters=LLAMA3), "LlamaForCausalLM")
    assert (spec.hidden_size, spec.intermediate_size, spec.head_dim, spec.num_key_value_heads) == (64, 96, 16, 2)
    assert spec.rope_parameters == LLAMA3
    assert (spec.boundaries, spec.num_target_layers) == ((2, 4, 5), 8)
    assert spec.draft_vocab_size == 500, "no larger than the target's"


def test_a_mixture_of_experts_gives_six_times_its_hidden_size(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**GEOMETRY, head_dim=32, moe_intermediate_size=16)
    spec = derived(tmp_path, config, "Qwen3MoeForCausalLM")
    assert (spec.intermediate_size, spec.head_dim) == (384, 32)
    assert derived(tmp_path, config, "Qwen3MoeForCausalLM", intermediate_size=128).intermediate_size == 128


def test_the_rope_of_gpt_oss_is_read_as_the_hub_writes_it_and_keeps_truncate(tmp_path: Path) -> None:
    config = GptOssConfig(**GEOMETRY, head_dim=64, num_local_experts=4, **GPT_OSS_ON_THE_HUB)
    rope = derived(tmp_path, config, "GptOssForCausalLM").rope_parameters
    assert rope == GPT_OSS_ON_THE_HUB["rope_scaling"] | {"rope_theta": 150000}


def test_a_yarn_block_without_truncate_is_spelled_out_as_engines_read_it(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    spec = derived(tmp_path, LlamaConfig(**GEOMETRY, rope_parameters=rope), "LlamaForCausalLM")
    assert spec.rope_parameters == rope | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def test_a_rope_that_drafts_do_not_compute_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    with pytest.raises(TrainError, match="partial_rotary_factor"):
        derived(tmp_path, Phi3Config(**GEOMETRY, rope_parameters=rope, pad_token_id=0), "Phi3ForCausalLM")


def test_a_boundary_that_is_not_stored_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="boundary 3 is not in the store, which has 2,4,5"):
        derived(tmp_path, LlamaConfig(**GEOMETRY), "LlamaForCausalLM", boundaries=(2, 3))


def test_a_spec_survives_its_file(tmp_path: Path) -> None:
    spec = derived(tmp_path, LlamaConfig(**GEOMETRY), "LlamaForCausalLM")
    save_spec(spec, tmp_path / "draft.json")
    assert load_spec(tmp_path / "draft.json") == spec
