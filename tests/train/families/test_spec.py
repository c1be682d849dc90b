"""From a target's config to a draft's."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig, LlamaConfig, Phi3Config, Qwen3Config, Qwen3MoeConfig

from specx.extract.target import ARCHITECTURES
from specx.train.config import TrainConfig
from specx.train.errors import TrainError
from specx.train.families.base import StoredFeatures
from specx.train.families.load import load_spec
from specx.train.families.registry import family
from specx.train.families.spec import DraftSpec, save_spec
from specx.train.families.targets import TARGETS, read_target

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
    return spec_of(folder, **settings)


def spec_of(folder: Path, *, last_hidden: bool = True, **settings: Any) -> DraftSpec:
    """The draft of a target's directory, for a store of boundaries 2, 4 and 5."""
    config = TrainConfig(store="store", out="out", **settings)
    stored = StoredFeatures(boundaries=(2, 4, 5), last_hidden=last_hidden)
    spec: DraftSpec = family(config.method).make_spec(config.draft, read_target(folder, "store"), stored)
    return spec


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


def test_a_config_in_the_form_before_transformers_5_is_completed(tmp_path: Path) -> None:
    config = GptOssConfig(**GEOMETRY, head_dim=64, num_local_experts=4, **GPT_OSS_ON_THE_HUB)
    expected = derived(tmp_path, config, "GptOssForCausalLM")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"], values["num_key_value_heads"]
    path.write_text(json.dumps(values | GPT_OSS_ON_THE_HUB))
    found = spec_of(tmp_path)
    assert found == expected.model_copy(update={"num_key_value_heads": GptOssConfig().num_key_value_heads})


def test_a_head_dimension_that_is_not_written_is_the_default_of_the_target_s_class(tmp_path: Path) -> None:
    derived(tmp_path, Qwen3Config(**GEOMETRY), "Qwen3ForCausalLM")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("head_dim") == 128
    path.write_text(json.dumps(values))
    assert spec_of(tmp_path).head_dim == 128


def test_a_yarn_block_without_truncate_is_spelled_out_as_engines_read_it(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    spec = derived(tmp_path, LlamaConfig(**GEOMETRY, rope_parameters=rope), "LlamaForCausalLM")
    assert spec.rope_parameters == rope | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def test_a_partial_rope_is_kept_where_the_target_computes_it_and_dropped_where_it_does_not(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    phi3 = derived(tmp_path, Phi3Config(**GEOMETRY, **tokens, rope_parameters=rope), "Phi3ForCausalLM")
    assert phi3.rope_parameters == rope
    llama = derived(tmp_path, LlamaConfig(**GEOMETRY, rope_parameters=rope), "LlamaForCausalLM")
    assert llama.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "the target's rope is dynamic, expected one of"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5}, "concentration"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}, "no mscale"),
    ],
    ids=["dynamic", "attention_factor", "mscale"],
)
def test_a_rope_that_drafts_do_not_compute_is_refused(tmp_path: Path, rope: dict[str, Any], message: str) -> None:
    rope = rope | {"original_max_position_embeddings": 512}
    with pytest.raises(TrainError, match=message):
        derived(tmp_path, LlamaConfig(**GEOMETRY, rope_parameters=rope), "LlamaForCausalLM")


def test_a_longrope_is_refused_by_its_name(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with pytest.raises(TrainError, match="the target's rope is longrope"):
        derived(tmp_path, Phi3Config(**GEOMETRY, **tokens, rope_parameters=rope), "Phi3ForCausalLM")


def test_an_unknown_target_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="a MambaForCausalLM, expected one of GptOssForCausalLM, LlamaForCausalLM"):
        derived(tmp_path, LlamaConfig(**GEOMETRY), "MambaForCausalLM")


def test_every_target_that_extraction_takes_is_known() -> None:
    assert sorted(TARGETS) == sorted(ARCHITECTURES)


def test_eagle1_reads_no_boundaries_and_has_the_full_vocabulary(tmp_path: Path) -> None:
    spec = derived(tmp_path, LlamaConfig(**GEOMETRY), "LlamaForCausalLM", method="eagle1")
    assert (spec.method, spec.boundaries, spec.draft_vocab_size) == ("eagle1", (), 500)


def test_eagle1_without_last_hidden_states_is_refused(tmp_path: Path) -> None:
    derived(tmp_path, LlamaConfig(**GEOMETRY), "LlamaForCausalLM")
    with pytest.raises(TrainError, match="no last hidden states, which EAGLE-1 is trained on"):
        spec_of(tmp_path, last_hidden=False, method="eagle1")


def test_a_boundary_that_is_not_stored_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="boundary 3 is not in the store, which has 2,4,5"):
        derived(tmp_path, LlamaConfig(**GEOMETRY), "LlamaForCausalLM", boundaries=(2, 3))


def test_a_spec_survives_its_file(tmp_path: Path) -> None:
    spec = derived(tmp_path, LlamaConfig(**GEOMETRY), "LlamaForCausalLM")
    save_spec(spec, tmp_path / "draft.json")
    assert load_spec(tmp_path / "draft.json") == spec
