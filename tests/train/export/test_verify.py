"""A draft that would not be served as it was trained is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specx.train.errors import ExportError
from specx.train.export.verify import TrainedDraft, check_draft
from specx.train.export.write import export, read_trained
from specx.train.families.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Form
from specx.train.loop.run_directory import RunDirectory

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> TrainedDraft:
    return read_trained(RunDirectory(trained_run))


@pytest.fixture
def draft(tmp_path: Path, exported_draft: Path) -> Path:
    return Path(shutil.copytree(exported_draft, tmp_path / "draft"))


def change_config(draft: Path, change: Callable[[Config], object]) -> None:
    path = draft / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_tensors(draft: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(draft / WEIGHTS_FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft / WEIGHTS_FILE)


def swapped(tensors: Tensors, name: str) -> None:
    embedding, hidden = tensors[name].chunk(2, dim=1)
    tensors[name] = torch.cat((hidden, embedding), dim=1)


def test_an_untouched_export_passes(draft: Path, trained: TrainedDraft) -> None:
    check_draft(draft, trained, Form())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rope_parameters"].pop("truncate"), "truncate"),
        (lambda c: c["rope_parameters"].update(truncate=True), "rope_parameters"),
        (lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 150000.0}), "rope_parameters"),
        (lambda c: c["rope_parameters"].update(attention_factor=1.0), "rope_parameters"),
        (lambda c: c.update(original_max_position_embeddings=128), "unexpected key"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 4, 6]), "eagle_aux_hidden_state_layer_ids"),
        (lambda c: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[1, 3, 5]), "eagle_config"),
        (lambda c: c.pop("head_dim"), "head_dim is missing"),
        (lambda c: c.pop("draft_vocab_size"), "draft_vocab_size is missing"),
        (lambda c: c.update(max_position_embeddings=2048), "max_position_embeddings"),
        (lambda c: c.update(norm_output=False), "norm_output"),
        (lambda c: c.update(fc_norm=False), "fc_norm"),
        (lambda c: c.update(norm_before_residual=True), "norm_before_residual"),
        (lambda c: c.update(num_hidden_layers=6), "num_hidden_layers"),
        (lambda c: c.update(architectures=["LlamaEagle3DraftModel"]), "architectures"),
        (lambda c: c.update(dtype="float16"), "dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_config_is_refused(
    draft: Path, trained: TrainedDraft, change: Callable[[Config], object], message: str
) -> None:
    change_config(draft, change)
    with pytest.raises(ExportError, match=message):
        check_draft(draft, trained, Form())


def test_the_angles_are_compared_with_those_trained_and_not_only_with_the_spec(
    draft: Path, trained: TrainedDraft
) -> None:
    # As if the spec itself had been derived wrongly: config and spec agree, the trained angles do not.
    rope = trained.spec.rope_parameters | {"truncate": True}
    change_config(draft, lambda config: config.update(rope_parameters=rope))
    wrong = TrainedDraft(
        spec=trained.spec.model_copy(update={"rope_parameters": rope}),
        weights=trained.weights,
        vocabulary=trained.vocabulary,
        rope=trained.rope,
    )
    with pytest.raises(ExportError, match="rad from those trained with"):
        check_draft(draft, wrong, Form())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: swapped(t, "midlayer.self_attn.q_proj.weight"), "q_proj.weight differs"),
        (lambda t: swapped(t, "midlayer.self_attn.v_proj.weight"), "v_proj.weight differs"),
        (lambda t: t.update(d2t=t["d2t"] + torch.arange(len(t["d2t"]))), "offsets, not ids"),
        (lambda t: t.update(d2t=t["d2t"].int()), "d2t is torch.int32"),
        (lambda t: t.update(t2d=~t["t2d"]), "t2d does not mark"),
        (lambda t: t.pop("d2t"), "d2t is missing"),
        (lambda t: t.pop("fc_norm.2.weight"), "fc_norm.2.weight is missing"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(2, 2)}), "unexpected tensor embed_tokens"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].T}), "fc.weight has shape"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].float()}), "fc.weight is torch.float32"),
        (lambda t: t["norm.weight"].fill_(float("nan")), "not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_changed_tensors_are_refused(
    draft: Path, trained: TrainedDraft, change: Callable[[Tensors], object], message: str
) -> None:
    change_tensors(draft, change)
    with pytest.raises(ExportError, match=message):
        check_draft(draft, trained, Form())


def test_every_tensor_that_is_missing_is_noticed(draft: Path, trained: TrainedDraft) -> None:
    names = sorted(load_file(draft / WEIGHTS_FILE))
    assert len(names) == 18
    for name in names:
        kept = load_file(draft / WEIGHTS_FILE)
        tensor = kept.pop(name)
        save_file(kept, draft / WEIGHTS_FILE)
        with pytest.raises(ExportError, match=f"{name} is missing"):
            check_draft(draft, trained, Form())
        save_file(kept | {name: tensor}, draft / WEIGHTS_FILE)


def test_a_draft_that_fails_the_check_is_not_written(tmp_path: Path, trained_run: Path) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["draft.norm.weight"][0] = float("nan")
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    with pytest.raises(ExportError, match="not finite"):
        export(run, tmp_path / "refused", checkpoint="last")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
