"""Angles of the draft against the target's own implementation and the formula."""

import math
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig, Phi3Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary

from specx.train.rope.rotary import RotaryEmbedding, rotate

ROPE: dict[str, Any] = GptOssConfig().rope_parameters
"""That of gpt-oss."""

GPT_OSS = {
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": ROPE,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_cos_and_sin_equal_those_of_gpt_oss_at_every_position() -> None:
    target = GptOssRotaryEmbedding(GptOssConfig(**GPT_OSS))
    ours = RotaryEmbedding(64, ROPE)
    for start in range(0, 131072, 16384):
        positions = torch.arange(start, start + 16384)[None]
        like = torch.zeros(1, 1)
        # gpt-oss keeps half the width; the other half is the same again.
        for found, half in zip(ours(like, positions), target(like, positions), strict=True):
            assert torch.equal(found, torch.cat((half, half), dim=-1))


def test_frequencies_follow_the_yarn_formula_without_truncation() -> None:
    ours = RotaryEmbedding(64, ROPE)
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
    assert not torch.equal(RotaryEmbedding(64, ROPE | change).inv_freq, RotaryEmbedding(64, ROPE).inv_freq)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3 | {"original_max_position_embeddings": 8192},
        ROPE,
        ROPE | {"truncate": True},
        ROPE | {"attention_factor": 1.0},
        ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_angles_are_those_of_transformers_to_the_last_bit(rope: dict[str, Any], theta: float) -> None:
    block = rope | {"rope_theta": theta}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**GPT_OSS | {"rope_parameters": dict(block)}))
    ours = RotaryEmbedding(64, block)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling
    for dtype in (torch.float32, torch.bfloat16):
        like, positions = torch.zeros(1, dtype=dtype), torch.arange(100_000, 100_050).reshape(2, 25)
        for found, expected in zip(ours(like, positions), theirs(like, positions), strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, expected)


def test_rotation_is_that_of_transformers() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(5)[None])
    heads = torch.randn(1, 4, 5, 8)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(rotate(heads, cos, sin), expected)


def test_a_partial_rotation_is_that_of_phi3() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    config = Phi3Config(
        hidden_size=32, num_attention_heads=2, rope_parameters=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    like, positions, heads = torch.zeros(1), torch.arange(5)[None], torch.randn(1, 2, 5, 16)
    cos, sin = Phi3RotaryEmbedding(config)(like, positions)
    expected, _ = apply_partial_rotary(heads, heads, cos, sin)
    assert cos.shape[-1] == 12
    torch.testing.assert_close(rotate(heads, *RotaryEmbedding(16, rope)(like, positions)), expected)
