"""Drafts trained with one rope and served with another, and what the estimate says of them.

``specx train`` has no option for the rope, as every other than the target's is a mistake. Here a store is copied by
links and the config in its copy of the target is given another block; everything else is ``specx`` as it is.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specx.storage.store import TARGET_DIRECTORY, FeatureStore
from specx.train.config import TrainConfig
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.estimate import EstimateSummary
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.export.write import export
from specx.train.pipeline import run as train
from specx.train.rope.frequencies import frequencies

TARGET_ROPE = "yarn"
DISTANCES = (16, 64, 256, 1024, 4096, 16384, 65536)
"""Where scores are compared."""

SERVED = {
    TARGET_ROPE: (TARGET_ROPE, "yarn-truncated", "plain-150000", "plain-10000"),
    "yarn-truncated": ("yarn-truncated", TARGET_ROPE),
    "plain-150000": ("plain-150000", TARGET_ROPE, "yarn-unscaled"),
    "plain-10000": ("plain-10000", TARGET_ROPE, "yarn-unscaled"),
}
"""Of each rope to train with, those to serve with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One draft."""

    rope: str
    length: int
    """Tokens of the conversations that it is trained on."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rope}-{self.length}-{self.seed}"


def rope_blocks(target: Path) -> dict[str, dict[str, Any]]:
    """Return the rope blocks by name, made from the target's own."""
    own: dict[str, Any] = json.loads((target / "config.json").read_text())["rope_parameters"]
    assert own["rope_type"] == "yarn"
    assert own["truncate"] is False
    return {
        TARGET_ROPE: own,
        "yarn-truncated": own | {"truncate": True},
        # The target's angles, without YaRN's factor on cos and sin.
        "yarn-unscaled": own | {"attention_factor": 1.0},
        "plain-150000": {"rope_type": "default", "rope_theta": 150_000.0},
        "plain-10000": {"rope_type": "default", "rope_theta": 10_000.0},
    }


def correlations(target: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return how alike attention scores are to those with the target's rope, by model, rope and distance in tokens.

    For q and k of independent normal numbers the scores of two ropes correlate as the mean of cos(distance * (f - g))
    over their frequencies f and g. The second model is gpt-oss itself, whose heads and original context are larger.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, head_dim, original in (("tiny gpt-oss", 32, 128), ("gpt-oss", 64, 4096)):
        angles = {
            # What YaRN alone reads.
            name: frequencies(block | {"original_max_position_embeddings": original}, head_dim).double()
            for name, block in rope_blocks(target).items()
            if name != "yarn-unscaled"
        }
        own = angles.pop(TARGET_ROPE)
        found[model] = {
            name: {str(each): round(float(torch.cos((other - own) * each).mean()), 2) for each in DISTANCES}
            for name, other in angles.items()
        }
    return found


def store_with_rope(store: Path, out: Path, rope: Mapping[str, Any]) -> None:
    """Make at ``out`` the same store of a target with another rope; features are links, nothing is run again."""
    if out.exists():
        return
    temporary = out.with_name(f"{out.name}.making")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(store, temporary, copy_function=os.link, ignore=shutil.ignore_patterns(TARGET_DIRECTORY))
    source = FeatureStore.open(str(store)).target_directory
    with FeatureStore.open(str(temporary)).new_target() as path:
        shutil.copytree(source, path, dirs_exist_ok=True)
        _replace_rope(path / "config.json", rope)
    temporary.rename(out)


def draft_with_rope(draft: Path, out: Path, rope: Mapping[str, Any]) -> None:
    """Make at ``out`` the same exported draft with another block, as an export that took it from elsewhere."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(draft, out)
    _replace_rope(out / "config.json", rope)


def measure(job: Job, root: Path, target: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train a draft, export it, and return what each way to serve it is estimated at; what is done is not redone."""
    rows = rows_file(root, job)
    if rows.exists():
        found: list[dict[str, Any]] = json.loads(rows.read_text())
        return found
    blocks = rope_blocks(target)
    store, run = root / "stores" / f"{job.rope}-{job.length}", root / "runs" / job.name
    config = TrainConfig(store=(str(store),), out=str(run), seed=job.seed, **settings)
    trained = train(config)
    exported = drafts(root, job, job.rope)
    if not exported.exists():
        export(run, exported)
    measured = []
    for rope in SERVED[job.rope]:
        served = drafts(root, job, rope)
        if rope != job.rope:
            draft_with_rope(exported, served, blocks[rope])
        summary = evaluate(EvaluateConfig(draft=str(served), store=str(root / "stores" / "questions"), split="all"))
        assert isinstance(summary, EstimateSummary)
        measured.append(
            {
                "trained": job.rope,
                "length": job.length,
                "served": rope,
                "seed": job.seed,
                "acceptance_length": summary.acceptance_length,
                "by_context": summary.by_context,
                "verifications": summary.verifications,
                "trained_tokens": trained.tokens,
                "train_seconds": trained.seconds,
                "estimate_seconds": summary.seconds,
            }
        )
    write_json(measured, rows)
    return measured


def rows_file(root: Path, job: Job) -> Path:
    """Return where what was measured of a draft lies, once it is."""
    return root / "rows" / f"{job.name}.json"


def drafts(root: Path, job: Job, rope: str) -> Path:
    """Return where the draft lies as it is served with a rope."""
    return root / "drafts" / f"{job.name}-served-{rope}"


def write_json(value: Any, path: Path) -> None:
    """Write it, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.rename(path)


def _replace_rope(path: Path, rope: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_parameters": dict(rope)}, indent=2) + "\n")
