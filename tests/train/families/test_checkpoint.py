"""Forms of export: what each engine is refused, and that what is written is read back the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specx.train.errors import ExportError
from specx.train.export.verify import TrainedDraft, check_draft
from specx.train.export.write import write_draft
from specx.train.families.checkpoint import Engine, Form, Format, require_servable
from specx.train.families.load import load_draft, recognize
from specx.train.families.registry import family
from specx.train.families.spec import DraftSpec

from ..conftest import VARIANTS, make_eagle1_spec, make_spec, new_draft


def trained(spec: DraftSpec) -> TrainedDraft:
    torch.manual_seed(0)
    draft = new_draft(spec)
    return TrainedDraft(
        spec=spec,
        weights=dict(draft.state_dict()),
        vocabulary=torch.arange(spec.draft_vocab_size),
        rope=draft.rotary.angles(),
    )


def served(spec: DraftSpec, chosen: Format, engines: tuple[Engine, ...]) -> tuple[Engine, ...]:
    return require_servable(family(spec.method).checkpoint, spec, chosen, engines, "run")


FORMS = {"native": Form(), "speculators": Form(format="speculators", engines=("vllm",), target="org/target")}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize(
    "changes", [*VARIANTS.values(), {"trained_embeddings": True}], ids=[*VARIANTS, "trained embeddings"]
)
def test_a_draft_read_back_is_the_one_written(tmp_path: Path, form: Form, changes: dict[str, Any]) -> None:
    draft = trained(make_spec(**changes))
    write_draft(tmp_path / "draft", draft, "float32", form)
    check_draft(tmp_path / "draft", draft, form)
    back = load_draft(tmp_path / "draft", torch.float32)
    unsaid = {"target_architecture": "", "num_target_layers": 0}
    assert back.draft.spec == draft.spec.model_copy(update=unsaid)
    for name, weight in back.draft.state_dict().items():
        assert torch.equal(weight, draft.weights[name])


@pytest.mark.parametrize(
    ("engine", "architecture", "tensors"),
    [("vllm", "EagleLlamaForCausalLM", 9), ("sglang", "LlamaForCausalLMEagle", 10)],
)
def test_eagle1_is_written_as_its_engine_wants_it(tmp_path: Path, engine: Any, architecture: str, tensors: int) -> None:
    draft, form = trained(make_eagle1_spec()), Form(engines=(engine,))
    write_draft(tmp_path / "draft", draft, "float32", form)
    check_draft(tmp_path / "draft", draft, form)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    found = recognize(config)
    assert found is not None
    assert (config["architectures"], found.checkpoint.vllm_method()) == ([architecture], "eagle")
    written = load_file(tmp_path / "draft" / "model.safetensors")
    assert len(written) == tensors
    assert "lm_head.weight" not in written
    if engine == "sglang":
        assert not written["fc.bias"].any()
    assert torch.equal(load_draft(tmp_path / "draft", torch.float32).draft.fc.weight, draft.weights["fc.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_before_fc": True, "fc_norm": False}, "no norm_before_fc; train with fc_norm instead"),
        ({"norm_before_residual": True}, "no norm_before_residual; train without"),
        ({"trained_embeddings": True}, "overwrites the draft's embeddings"),
        ({"boundaries": (3,)}, "leaves out fc with a single boundary"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_sglang_cannot_serve_is_refused_there_and_written_for_vllm(changes: dict[str, Any], reason: str) -> None:
    spec = make_spec(**changes)
    with pytest.raises(ExportError, match=f"run: this draft cannot be served by sglang: .*{reason}"):
        served(spec, "native", ("sglang",))
    assert served(spec, "native", ("vllm", "sglang")) == ("vllm",)


def test_one_directory_is_for_both_engines_but_for_eagle1() -> None:
    assert served(make_spec(), "native", ("vllm", "sglang")) == ("vllm", "sglang")
    assert served(make_eagle1_spec(), "native", ("vllm", "sglang")) == ("vllm",)
    assert served(make_eagle1_spec(), "native", ("sglang",)) == ("sglang",)


def test_the_speculators_format_is_for_vllm_and_eagle3() -> None:
    assert served(make_spec(), "speculators", ("vllm", "sglang")) == ("vllm",)
    with pytest.raises(ExportError, match="sglang: it does not read the speculators format; choose --format native"):
        served(make_spec(), "speculators", ("sglang",))
    with pytest.raises(ExportError, match="no EAGLE-1 that it reads"):
        served(make_eagle1_spec(), "speculators", ("vllm", "sglang"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("norm_before_residual"), "norm_before_residual is missing"),
        (lambda c: c["transformer_layer_config"].pop("num_aux_hidden_states"), "num_aux_hidden_states is missing"),
        (
            lambda c: c["transformer_layer_config"]["rope_parameters"].update(truncate=True),
            "transformer_layer_config.rope_parameters.truncate is True, the draft was trained with False",
        ),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[0, 2, 4]), "eagle_aux_hidden_state_layer_ids"),
    ],
    ids=["norm_before_residual", "number of states", "truncate", "layer ids"],
)
def test_a_changed_speculators_config_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    draft, form = trained(make_spec()), FORMS["speculators"]
    write_draft(tmp_path / "draft", draft, "float32", form)
    path = tmp_path / "draft" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError, match=message):
        check_draft(tmp_path / "draft", draft, form)
