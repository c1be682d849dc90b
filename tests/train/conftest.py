"""Small drafts and batches with random weights, in float32."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specx.train.data.batch import PADDING, Batch
from specx.train.families.base import DraftModel
from specx.train.families.eagle1.spec import Eagle1Spec
from specx.train.families.eagle3.draft import Eagle3Draft
from specx.train.families.eagle3.spec import Eagle3Spec
from specx.train.families.registry import family
from specx.train.families.spec import DraftSpec
from specx.train.loss.anchors import supervised_anchors
from specx.train.loss.target_distribution import Vocabulary

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "eagle3": {"norm_output": False, "fc_norm": False},
    "norm_output": {"fc_norm": False},
    "norm_before_fc": {"fc_norm": False, "norm_before_fc": True},
    "norm_before_residual": {"norm_output": False, "fc_norm": False, "norm_before_residual": True},
    "window": {"sliding_window": 6},
    "trained embeddings": {"trained_embeddings": True},
    "one boundary": {"boundaries": (3,)},
    "four boundaries": {"boundaries": (1, 2, 3, 5)},
    "partial rotary": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        "head_dim": 16,
    },
}


def make_spec(**changes: Any) -> Eagle3Spec:
    """Return an EAGLE-3 draft of hidden size 32 with YaRN from 16 positions."""
    spec = Eagle3Spec(
        target_architecture="GptOssForCausalLM",
        num_target_layers=6,
        boundaries=(1, 3, 5),
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        vocab_size=50,
        draft_vocab_size=20,
        max_position_embeddings=512,
        rope_parameters=YARN,
        norm_output=True,
        fc_norm=True,
    )
    return Eagle3Spec.model_validate(spec.model_dump() | changes)


def make_eagle1_spec(**changes: Any) -> Eagle1Spec:
    """Return an EAGLE-1 draft of the same target."""
    shape = {key: value for key, value in make_spec().model_dump().items() if key in DraftSpec.model_fields}
    own = {"method": "eagle1", "boundaries": (), "draft_vocab_size": 50}
    return Eagle1Spec.model_validate(shape | own | changes)


def new_draft(spec: DraftSpec) -> DraftModel:
    """Return a draft of any family with random weights."""
    built: DraftModel = family(spec.method).build(spec)
    return built


def anchored(batch: Batch, steps: int) -> Batch:
    """Return the batch with the anchors that EAGLE's families draw."""
    return replace(batch, anchors=supervised_anchors(batch, steps))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def spec(request: pytest.FixtureRequest) -> Eagle3Spec:
    return make_spec(**request.param)


@pytest.fixture
def draft(spec: Eagle3Spec) -> Eagle3Draft:
    """A draft whose every weight is random, the norms' too."""
    torch.manual_seed(1)
    draft = Eagle3Draft(spec)
    for weight in draft.parameters():
        is_norm = weight.ndim == 1
        torch.nn.init.normal_(weight, 1.0 if is_norm else 0.0, 0.2 if is_norm else weight.shape[1] ** -0.5)
    return draft


@pytest.fixture
def embed_tokens(spec: DraftSpec) -> torch.Tensor:
    """(V, H)"""
    torch.manual_seed(2)
    return torch.randn(spec.vocab_size, spec.hidden_size)


@pytest.fixture
def vocabulary(spec: DraftSpec) -> Vocabulary:
    """Every other token and the last ones, so that the draft's ids are not the target's."""
    torch.manual_seed(3)
    ids = torch.cat((torch.arange(0, 30, 2), torch.arange(45, 50)))
    t2d = torch.zeros(spec.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return Vocabulary(d2t=ids - torch.arange(len(ids)), t2d=t2d, target_head=torch.randn(len(ids), spec.hidden_size))


@pytest.fixture
def batch(spec: DraftSpec) -> Batch:
    """Two rows: documents of 13 and 7 tokens and padding, and one of 22."""
    generator = torch.Generator().manual_seed(4)
    B, T = 2, 22
    documents, positions = torch.full((B, T), PADDING), torch.zeros(B, T, dtype=torch.int64)
    for row, document, start, length in ((0, 0, 0, 13), (0, 1, 13, 7), (1, 0, 0, 22)):
        documents[row, start : start + length] = document
        positions[row, start : start + length] = torch.arange(length)
    is_token = documents != PADDING
    return Batch(
        input_ids=torch.randint(0, spec.vocab_size, (B, T), generator=generator) * is_token,
        loss_mask=(torch.rand(B, T, generator=generator) < 0.85) & is_token,
        documents=documents,
        positions=positions,
        aux_hidden=torch.randn(B, T, len(spec.boundaries), spec.hidden_size, generator=generator).bfloat16(),
        last_hidden=torch.randn(B, T, spec.hidden_size, generator=generator).bfloat16(),
        argmax=torch.randint(0, spec.vocab_size, (B, T), generator=generator),
        lse=torch.randn(B, T, generator=generator) + 12,
        seeds=torch.tensor([[11, 12], [13, 0]]),
    )


@pytest.fixture(scope="session")
def loss_curve() -> Callable[[Path], dict[int, float]]:
    """Return the loss by step, of all sessions of a run; a later session's word counts."""

    def read(out: Path, column: str = "train/loss") -> dict[int, float]:
        curve = {}
        for path in sorted(out.glob("logs/csv/from_step_*/metrics.csv")):
            # The last line may be half written.
            lines = path.read_text().splitlines(keepends=True)
            for row in csv.DictReader(line for line in lines if line.endswith("\n")):
                if row[column]:
                    curve[int(row["step"])] = float(row[column])
        return curve

    return read
