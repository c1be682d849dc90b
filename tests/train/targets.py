"""Tiny targets with random weights, one of each architecture, made by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 300

GEOMETRY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Random weights of the usual size would give next to equal logits, decided by rounding.
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}

CONFIGS: dict[str, PretrainedConfig] = {
    "LlamaForCausalLM": LlamaConfig(**GEOMETRY, head_dim=32, rope_parameters=LLAMA3),
    "Qwen3ForCausalLM": Qwen3Config(**GEOMETRY, head_dim=32, rope_parameters=YARN, tie_word_embeddings=True),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(
        **GEOMETRY, head_dim=32, rope_parameters=LINEAR, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "Phi3ForCausalLM": Phi3Config(**GEOMETRY | {"num_attention_heads": 2}, rope_parameters=PARTIAL),
}


def make_target(directory: Path, architecture: str) -> Path:
    """Write a target with random weights in float32."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32).save_pretrained(directory)
    return directory


def make_rows(path: Path, sequences: int = 24, length: int = 60) -> Path:
    """Write rows of random token ids whose last half is supervised."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = torch.randint(3, VOCAB_SIZE, (sequences, length), generator=torch.Generator().manual_seed(0)).tolist()
    mask = [[0] * (length // 2) + [1] * (length - length // 2)] * sequences
    pq.write_table(pa.table({"input_ids": ids, "loss_mask": mask}), path)
    return path
