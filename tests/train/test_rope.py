"""Angles of the draft against the target's own implementation and the formula."""

import math

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig, Phi3Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary

from specx.train.rope import rotary_embedding, rotate

GPT_OSS = {
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


def test_cos_and_sin_equal_those_of_gpt_oss_at_every_position() -> None:
    target = GptOssRotaryEmbedding(GptOssConfig(**GPT_OSS))
    ours = rotary_embedding(GPT_OSS)
    for start in range(0, 131072, 16384):
        positions = torch.arange(start, start + 16384)[None]
        like = torch.zeros(1, 1)
        # gpt-oss keeps half the width; the other half is the same again.
        for found, half in zip(ours(like, positions), target(like, positions), strict=True):
            assert torch.equal(found, torch.cat((half, half), dim=-1))


def test_frequencies_follow_the_yarn_formula_without_truncation() -> None:
    ours = rotary_embedding(GPT_OSS)
    theta, factor = 150000.0, 32.0
    low, high = (64 * math.log(4096 / (2 * math.pi * r)) / (2 * math.log(theta)) for r in (32, 1))
    assert (low, high) == (pytest.approx(8.0928, abs=1e-4), pytest.approx(17.3980, abs=1e-4))
    i = torch.arange(32, dtype=torch.float64)
    frequency = theta ** (-2 * i / 64)
    ramp = ((i - low) / (high - low)).clamp(0, 1)
    expected = frequency * (1 - ramp) + frequency / factor * ramp
    torch.testing.assert_close(ours.inv_freq.double(), expected, rtol=1e-6, atol=0)
    assert ours.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)


@pytest.mark.parametrize(
    "change", [{"truncate": True}, {"rope_type": "default"}, {"factor": 16.0}, {"rope_theta": 10000.0}], ids=str
)
def test_another_rope_block_gives_other_angles(change: dict[str, object]) -> None:
    changed = rotary_embedding(GPT_OSS | {"rope_parameters": GPT_OSS["rope_parameters"] | change})
    assert not torch.equal(changed.inv_freq, rotary_embedding(GPT_OSS).inv_freq)


def test_rotation_is_that_of_transformers() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(5)[None])
    heads = torch.randn(1, 4, 5, 8)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(rotate(heads, cos, sin), expected)


def test_a_partial_rotation_is_that_of_phi3() -> None:
    config = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    }
    geometry = {key: config[key] for key in ("hidden_size", "num_attention_heads", "rope_parameters")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    like, positions, heads = torch.zeros(1), torch.arange(5)[None], torch.randn(1, 2, 5, 16)
    cos, sin = Phi3RotaryEmbedding(Phi3Config(**geometry, **tokens))(like, positions)
    expected, _ = apply_partial_rotary(heads, heads, cos, sin)
    assert cos.shape[-1] == 12
    torch.testing.assert_close(rotate(heads, *rotary_embedding(config)(like, positions)), expected)
