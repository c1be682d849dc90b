"""The step that everybody takes, the batch that it is taken on, and the target it is trained for.

Shapes: B rows, T tokens, L boundaries, H hidden size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

THREADS = 2
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 256, 1024, 8, 2, 64
ROWS, LENGTH, UNROLLED = 2, 512, 3
VOCABULARY, DRAFT_VOCABULARY = 8192, 2048
LAYERS = 6
BOUNDARIES = (1, 3, 5)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a step is made from, before a peer's own arrangement of it."""

    input_ids: torch.Tensor
    """(B, T) int64"""
    loss_mask: torch.Tensor
    """(B, T) int64, 1 where the loss counts"""
    aux_hidden: torch.Tensor
    """(B, T, L * H), in the type of the step"""
    last_hidden: torch.Tensor
    """(B, T, H), the same"""
    target_head: torch.Tensor
    """(V, H) float32"""


def inputs(dtype: str, is_half: bool) -> Inputs:
    """Return two rows of 512 tokens, of which the second half is supervised, or all."""
    torch.manual_seed(0)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    if is_half:
        mask[:, : LENGTH // 2] = 0
    return Inputs(
        input_ids=torch.randint(0, VOCABULARY, (ROWS, LENGTH)),
        loss_mask=mask,
        aux_hidden=torch.randn(ROWS, LENGTH, len(BOUNDARIES) * HIDDEN).to(DTYPES[dtype]),
        last_hidden=torch.randn(ROWS, LENGTH, HIDDEN).to(DTYPES[dtype]),
        target_head=favourites(torch.randn(VOCABULARY, HIDDEN) / 10),
    )


def favourites(head: torch.Tensor) -> torch.Tensor:
    """Let the target always prefer a token of the draft's vocabulary, so that nobody may leave a row out."""
    head = head.clone()
    head[DRAFT_VOCABULARY:] *= 0.1
    return head


def draft_ids() -> torch.Tensor:
    """Return the draft's vocabulary: the first tokens of the target's."""
    return torch.arange(DRAFT_VOCABULARY)


def membership() -> torch.Tensor:
    return torch.arange(VOCABULARY) < DRAFT_VOCABULARY


def make_target(folder: Path) -> None:
    """Write what peers read of a target: configuration, embedding, head and last norm in a checkpoint, a tokenizer."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, num_hidden_layers=LAYERS, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5,
        "lm_head.weight": favourites(torch.randn(VOCABULARY, HIDDEN) / 10),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    file = "model-00001-of-00001.safetensors"
    save_file({name: each.bfloat16() for name, each in tensors.items()}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
