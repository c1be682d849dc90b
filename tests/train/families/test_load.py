"""Starting a run from an exported draft."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specx.train.config import TrainConfig
from specx.train.errors import TrainError
from specx.train.export.write import export
from specx.train.families.load import load_draft
from specx.train.pipeline import run


def settings(store: Path, out: Path, **changes: Any) -> TrainConfig:
    base = {"store": str(store), "out": str(out), "max_steps": 1, "step_tokens": 1024, "lr": 1e-9, "ttt_steps": 2}
    return TrainConfig.model_validate({key: value for key, value in (base | changes).items() if value is not None})


def test_a_run_starts_from_the_weights_and_the_vocabulary_of_another_draft(
    tmp_path: Path, tiny_store: Path, exported_draft: Path
) -> None:
    run(settings(tiny_store, tmp_path / "run", init_from=str(exported_draft)))
    export(tmp_path / "run", tmp_path / "draft")
    before, after = (load_draft(path, torch.float32) for path in (exported_draft, tmp_path / "draft"))
    assert torch.equal(before.vocabulary, after.vocabulary)
    assert np.load(tmp_path / "run" / "vocabulary.npy").tolist() == before.vocabulary.tolist()
    for name, weight in before.draft.state_dict().items():
        torch.testing.assert_close(after.draft.state_dict()[name], weight, rtol=0.01, atol=1e-6)


def test_embeddings_that_are_trained_start_from_the_target_s(
    tmp_path: Path, target: Path, tiny_store: Path, exported_draft: Path
) -> None:
    run(settings(tiny_store, tmp_path / "run", init_from=str(exported_draft), train_embeddings=True))
    export(tmp_path / "run", tmp_path / "draft", dtype="float32")
    found = load_file(tmp_path / "draft" / "model.safetensors")["embed_tokens.weight"]
    torch.testing.assert_close(
        found, load_file(target / "model.safetensors")["model.embed_tokens.weight"].float(), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundaries": (1, 3)}, r"its boundaries is \(1, 3, 5\), this run's \(1, 3\). Start from another draft"),
        ({"intermediate_size": 64}, r"its midlayer.mlp.down_proj.weight is \(128, 768\), this run's \(128, 64\)"),
        ({"fc_norm": False}, r"its fc_norm.0.weight is \(128,\), this run's none"),
        ({"preset": "eagle1"}, "its method is eagle3, this run's eagle1"),
    ],
    ids=["boundaries", "shape", "missing", "method"],
)
def test_a_draft_that_does_not_fit_is_refused_by_what_differs(
    tmp_path: Path, tiny_store: Path, exported_draft: Path, changes: dict[str, Any], message: str
) -> None:
    if "preset" in changes:
        changes = changes | {"ttt_steps": None}
    with pytest.raises(TrainError, match=message):
        run(settings(tiny_store, tmp_path / "run", init_from=str(exported_draft), **changes))
    assert not (tmp_path / "run").exists()


def test_a_directory_without_a_draft_is_refused(tmp_path: Path, tiny_store: Path) -> None:
    with pytest.raises(TrainError, match="not an exported draft"):
        run(settings(tiny_store, tmp_path / "run", init_from=str(tmp_path)))


def test_the_option_for_the_window_in_sglang_is_told_on_export(
    tmp_path: Path, tiny_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(settings(tiny_store, tmp_path / "run", sliding_window=24))
    with caplog.at_level(logging.INFO, logger="specx"):
        export(tmp_path / "run", tmp_path / "draft")
    assert "--speculative-draft-window-size 23" in caplog.text
