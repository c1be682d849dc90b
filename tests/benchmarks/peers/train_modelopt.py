"""What ModelOpt's example of training on stored states does: a base without layers, its data, transformers' Trainer.

    train_modelopt.py FOLDER TARGET OUT

The example is not in its package, has a tokenizer and plots besides, and is started by ``accelerate launch``.
"""

import sys
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.speculative as mtsp
import shape
import torch
from modelopt.torch.speculative.eagle.utils import EagleOfflineDataCollator, OfflineSupervisedDataset
from modelopt.torch.speculative.plugins.modeling_fakebase import FakeBaseModel
from transformers import Trainer, TrainingArguments


def converted(base: FakeBaseModel, is_compiled: bool) -> Any:
    """Return the base with a draft of the shape."""
    architecture = {key: shape.LLAMA[key] for key in ("intermediate_size", "num_attention_heads", "head_dim")} | {
        "num_key_value_heads": shape.KV_HEADS,
        "rms_norm_eps": 1e-5,
        "draft_vocab_size": shape.DRAFT_VOCABULARY,
        "eagle_aux_hidden_state_layer_ids": list(shape.BOUNDARIES),
    }
    config = {
        "eagle_offline": True,
        "eagle_architecture_config": architecture,
        "eagle_ttt_steps": shape.UNROLLED,
        "eagle_use_torch_compile": is_compiled,
    }
    model = mtsp.convert(base, mode=[("eagle", config)])
    model.eagle_module.d2t.zero_()
    return model.train()


def dataset(folder: Path) -> OfflineSupervisedDataset:
    return OfflineSupervisedDataset(sorted(folder.glob("*.pt")), answer_only_loss=True)


def main() -> None:
    folder, target, out = sys.argv[1:]
    torch.manual_seed(0)
    mto.enable_huggingface_checkpointing()
    arguments = TrainingArguments(
        out,
        per_device_train_batch_size=shape.ROWS,
        bf16=True,
        use_cpu=True,
        remove_unused_columns=False,
        report_to="none",
        optim="adamw_torch",
        dataloader_num_workers=0,
    )
    trainer = Trainer(
        converted(FakeBaseModel.from_source(target), is_compiled=False),
        arguments,
        EagleOfflineDataCollator(train_len=shape.LENGTH),
        dataset(Path(folder)),
    )
    trainer.train()
