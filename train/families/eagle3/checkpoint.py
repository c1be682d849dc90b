"""The EAGLE-3 checkpoint that vLLM and SGLang load: its config, and the tensors a draft must have.

Neither engine reports a missing tensor, and each reads the layer ids from another
key with another meaning; so what is written, and what ``check`` demands, stands
here once.

Shapes: H hidden size, L boundaries, V target vocabulary, Vd draft vocabulary.
"""

from typing import Any

from ..spec import DraftSpec

ARCHITECTURE = "LlamaForCausalLMEagle3"
"""The only name that both engines take for this layout."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def engine_config(spec: DraftSpec, dtype: str) -> dict[str, Any]:
    """Return ``config.json`` for weights of ``dtype``.

    A boundary b is vLLM's layer id b (input of block b, top-level list) and SGLang's b - 1 (output of
    block b - 1, nested list). The rope block is complete: an omitted ``truncate`` means true to both.
    """
    return layer_config(spec) | {
        "architectures": [ARCHITECTURE],
        "target_hidden_size": spec.hidden_size,
        "draft_vocab_size": spec.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(spec.boundaries),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [boundary - 1 for boundary in spec.boundaries],
            "use_aux_hidden_state": True,
            "norm_before_fc": spec.norm_before_fc,
        },
        "num_aux_hidden_states": len(spec.boundaries),
        "fc_norm": spec.fc_norm,
        "norm_output": spec.norm_output,
        "norm_before_residual": spec.norm_before_residual,
        "dtype": dtype,
    }


def layer_config(spec: DraftSpec) -> dict[str, Any]:
    """Return what any Llama layer's config has, whatever the form of the checkpoint."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": spec.rope_parameters,
    }
    if "partial_rotary_factor" in spec.rope_parameters:
        # vLLM reads it in the rope block, SGLang here.
        config["partial_rotary_factor"] = spec.rope_parameters["partial_rotary_factor"]
    if spec.sliding_window is not None:
        config |= {"layer_types": ["sliding_attention"], "sliding_window": spec.sliding_window}
    return config


def weight_shapes(spec: DraftSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained tensor; inputs are joined as [embedding ; hidden]."""
    H, intermediate, L = spec.hidden_size, spec.intermediate_size, len(spec.boundaries)
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    attention_and_mlp = {
        "post_attention_layernorm.weight": (H,),
        "self_attn.o_proj.weight": (H, queries),
        "mlp.gate_proj.weight": (intermediate, H),
        "mlp.up_proj.weight": (intermediate, H),
        "mlp.down_proj.weight": (H, intermediate),
    }
    width = H if spec.method == "eagle1" else 2 * H
    attention_and_mlp |= {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
    }
    if spec.method == "eagle1":
        return {"fc.weight": (H, 2 * H)} | {f"layers.0.{name}": shape for name, shape in attention_and_mlp.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (H, L * H),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.input_layernorm.weight": (H,),
        "norm.weight": (H,),
        "lm_head.weight": (spec.draft_vocab_size, H),
    }
    shapes |= {f"midlayer.{name}": shape for name, shape in attention_and_mlp.items()}
    if spec.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (H,) for i in range(L)}
    if spec.norm_before_fc:
        shapes["input_norm.weight"] = (L * H,)
    if spec.trained_embeddings:
        shapes["embed_tokens.weight"] = (spec.vocab_size, H)
    return shapes


def vocabulary_shapes(spec: DraftSpec) -> dict[str, tuple[int, ...]]:
    """Return ``d2t`` (Vd,) int64 and ``t2d`` (V,) bool; none where the draft has the full vocabulary."""
    if spec.draft_vocab_size == spec.vocab_size:
        return {}
    return {"d2t": (spec.draft_vocab_size,), "t2d": (spec.vocab_size,)}
