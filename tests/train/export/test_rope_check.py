"""Wrong angles of a draft are found, whoever would build them; right ones pass, in every form of export."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig

from specx.train.errors import TrainError
from specx.train.export.rope_check import RopeCheck, check_rope, require_equal
from specx.train.export.verify import TrainedDraft
from specx.train.export.write import write_draft
from specx.train.families.checkpoint import CONFIG_FILE, ENGINES, Form
from specx.train.families.spec import DraftSpec
from specx.train.rope.served import served_angles

from ..conftest import YARN, make_eagle1_spec, make_spec, new_draft
from ..targets import CONFIGS, LINEAR, LLAMA3
from ..targets import YARN as TRUNCATED

Specx = Callable[..., subprocess.CompletedProcess[str]]
Config = dict[str, Any]

GPT_OSS_ROPE = YARN | {"original_max_position_embeddings": 4096}
PLAIN = {"rope_type": "default", "rope_theta": 150000.0}
CONCENTRATION = 0.1 * math.log(32) + 1


@pytest.fixture(scope="module")
def large_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with the angles of gpt-oss as released, 131072 positions."""
    path = tmp_path_factory.mktemp("target") / "gpt-oss"
    GptOssConfig(
        architectures=["GptOssForCausalLM"],
        head_dim=64,
        rope_parameters=dict(GPT_OSS_ROPE),
        max_position_embeddings=131072,
    ).save_pretrained(path)
    return path


def export(
    directory: Path, rope: Config, form: Form | None = None, make: Callable[..., DraftSpec] = make_spec, **changes: Any
) -> Path:
    spec = make(
        rope_parameters=rope, num_attention_heads=2, num_key_value_heads=1, head_dim=64, **changes,
        max_position_embeddings=131072,
    )  # fmt: skip
    draft = new_draft(spec)
    trained = TrainedDraft(
        spec=spec,
        weights=dict(draft.state_dict()),
        vocabulary=torch.arange(spec.draft_vocab_size),
        rope=draft.rotary.angles(),
    )
    write_draft(directory, trained, "float32", form or Form())
    return directory


def changed(draft: Path, change: Callable[[Config], object]) -> Path:
    path = draft / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return draft


def checked(target: Path, draft: Path, change: Callable[[Config], object]) -> RopeCheck:
    return check_rope(target, changed(export(draft, GPT_OSS_ROPE), change))


def test_an_exported_draft_of_the_tiny_target_has_its_angles(target: Path, exported_draft: Path) -> None:
    check = check_rope(target, exported_draft)
    assert check.verdict == "equal: draft, vllm, sglang have the target's angles and concentration"
    assert check.max_angle_error == 0.0
    assert check.concentration == dict.fromkeys(("target", "draft", *ENGINES), CONCENTRATION)
    assert list(check.angle_error["vllm"]) == ["128", "1024", "4095"]
    assert check.block == []
    require_equal(check, exported_draft)


def test_a_run_is_checked_before_it_is_exported(target: Path, trained_run: Path) -> None:
    assert check_rope(target, trained_run).max_angle_error == 0.0


@pytest.mark.parametrize(
    ("change", "readers", "block"),
    [
        (lambda c: c["rope_parameters"].pop("truncate"), 3, "truncate is missing, expected False"),
        (lambda c: c["rope_parameters"].update(rope_theta=10000.0), 3, "rope_theta is 10000.0, expected 150000.0"),
        (lambda c: c["rope_parameters"].pop("rope_theta"), 3, "rope_theta is 10000.0, expected 150000.0"),
        (lambda c: c["rope_parameters"].update(factor=16.0), 3, "factor is 16.0, expected 32.0"),
        (lambda c: c.update(rope_parameters=dict(PLAIN)), 3, "rope_type is default, expected yarn"),
        (lambda c: c.pop("rope_parameters"), 3, "rope_type is default, expected yarn"),
        (lambda c: c["rope_parameters"].update(attention_factor=1.0), 2, "attention_factor is 1.0, expected none"),
        (lambda c: c["rope_parameters"].update(attn_factor=CONCENTRATION), 1, "attn_factor is 1.34"),
        (lambda c: c["rope_parameters"].update(mscale=1.0, mscale_all_dim=1.0), 3, "mscale is 1.0, expected none"),
        (lambda c: c.update(original_max_position_embeddings=131072), 2, ""),
        (lambda c: c.update(head_dim=32), 3, ""),
    ],
    ids=[
        "no truncate", "theta 10000", "no theta", "factor 16", "plain", "no block", "attention factor 1",
        "attention factor on top", "mscale", "original positions beside the block", "head dimension",
    ],
)  # fmt: skip
def test_a_wrong_rope_is_found_with_who_would_build_it(
    large_target: Path, tmp_path: Path, change: Callable[[Config], object], readers: int, block: str
) -> None:
    check = checked(large_target, tmp_path / "draft", change)
    assert check.verdict.startswith("differs from the target: ")
    assert check.verdict.count(" rad at position 131071") == readers
    assert block in "; ".join(check.block)
    with pytest.raises(TrainError, match="draft: differs from the target"):
        require_equal(check, tmp_path / "draft")


def test_the_angles_that_a_missing_truncate_turns_wrong_grow_with_the_position(
    large_target: Path, tmp_path: Path
) -> None:
    check = checked(large_target, tmp_path / "draft", lambda c: c["rope_parameters"].pop("truncate"))
    errors = check.angle_error["sglang"]
    assert list(errors) == ["128", "1024", "4096", "16384", "131071"]
    assert errors["4096"] == pytest.approx(0.9, abs=0.05)
    assert errors["131071"] == pytest.approx(errors["4096"] * 131071 / 4096)
    assert check.max_angle_error == errors["131071"]
    assert set(check.concentration.values()) == {CONCENTRATION}


def test_an_attention_factor_written_twice_is_one_number_to_vllm_and_another_to_sglang(
    large_target: Path, tmp_path: Path
) -> None:
    twice = {"attention_factor": CONCENTRATION, "mscale": 1.0, "mscale_all_dim": 1.0}
    check = checked(large_target, tmp_path / "draft", lambda c: c["rope_parameters"].update(twice))
    assert check.concentration == {
        "target": CONCENTRATION,
        "draft": CONCENTRATION,
        "vllm": CONCENTRATION,
        "sglang": 1.0,
    }
    assert check.verdict == (
        "differs from the target: sglang by 0 rad at position 131071, concentration 1 against 1.34657"
    )


@pytest.mark.parametrize(
    ("form", "make", "readers"),
    [
        (Form(format="speculators", engines=("vllm",)), make_spec, ["draft", "vllm"]),
        (Form(engines=("vllm",)), make_eagle1_spec, ["draft", "vllm"]),
        (Form(engines=("sglang",)), make_eagle1_spec, ["draft", "sglang"]),
    ],
    ids=["speculators", "EAGLE-1 for vLLM", "EAGLE-1 for SGLang"],
)
def test_forms_that_one_engine_reads_are_checked_for_that_one(
    large_target: Path, tmp_path: Path, form: Form, make: Callable[..., DraftSpec], readers: list[str]
) -> None:
    draft = export(tmp_path / "draft", GPT_OSS_ROPE, form, make)
    check = check_rope(large_target, draft)
    assert (list(check.angle_error), check.max_angle_error) == (readers, 0.0)
    changed(draft, lambda c: c.get("transformer_layer_config", c)["rope_parameters"].pop("truncate"))
    assert check_rope(large_target, draft).verdict.count(" rad at position ") == 2


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_kind_of_target_has_a_draft_of_the_same_angles(tmp_path: Path, architecture: str) -> None:
    from specx.train.families.targets import TARGETS
    from specx.train.rope.rotary import draft_rope

    config = type(CONFIGS[architecture])(**CONFIGS[architecture].to_dict() | {"architectures": [architecture]})
    config.save_pretrained(tmp_path / "target")
    rope = draft_rope(
        config.to_dict()["rope_parameters"],
        "target",
        has_partial_rotary=TARGETS[architecture].has_partial_rotary,
    )
    draft = changed(export(tmp_path / "draft", rope), lambda c: c.update(head_dim=32))
    check = check_rope(tmp_path / "target", draft)
    assert check.verdict.startswith("equal: "), check
    assert check.max_angle_error < 1e-4


def test_a_partial_rope_that_stands_only_in_the_block_is_whole_to_sglang(tmp_path: Path) -> None:
    CONFIGS["Phi3ForCausalLM"].__class__(
        **CONFIGS["Phi3ForCausalLM"].to_dict() | {"architectures": ["Phi3ForCausalLM"]}
    ).save_pretrained(tmp_path / "target")
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    draft = changed(export(tmp_path / "draft", rope), lambda c: c.update(head_dim=32) or c.pop("partial_rotary_factor"))
    assert check_rope(tmp_path / "target", draft).verdict.startswith("differs from the target: sglang by ")


ROPES = {
    "yarn": GPT_OSS_ROPE,
    "truncated": TRUNCATED,
    "attention factor": GPT_OSS_ROPE | {"attention_factor": 1.1},
    "attention factor twice": GPT_OSS_ROPE | {"attention_factor": 1.1, "mscale": 0.7, "mscale_all_dim": 1.0},
    "mscale": GPT_OSS_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.0},
    "one mscale": GPT_OSS_ROPE | {"mscale": 0.7},
    "attn_factor": GPT_OSS_ROPE | {"attn_factor": 1.2},
    "no theta": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256},
    "llama3": LLAMA3,
    "linear": LINEAR,
    "plain": PLAIN,
    "partial": PLAIN | {"partial_rotary_factor": 0.5},
    "old key": {"type": "linear", "factor": 4.0},
}


# vLLM's own imports warn.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 200}], ids=["", "key beside the block"])
def test_vllm_builds_what_is_foretold(rope: Config, beside: Config) -> None:
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import patch_rope_parameters

    def layer() -> LlamaConfig:
        return LlamaConfig(
            hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=512,
            rope_parameters=dict(rope), **beside,
        )  # fmt: skip

    ours, config = served_angles(layer(), "vllm"), layer()
    patch_rope_parameters(config)
    with set_current_vllm_config(VllmConfig()):
        theirs = get_rope(64, 512, rope_parameters=config.rope_parameters, dtype=torch.float32)
    cos, sin = theirs.cos_sin_cache.chunk(2, dim=-1)
    angles = torch.arange(len(cos), dtype=torch.float32)[:, None] * ours.inv_freq
    torch.testing.assert_close(cos, angles.cos() * ours.concentration, rtol=0.0, atol=2e-4)
    torch.testing.assert_close(sin, angles.sin() * ours.concentration, rtol=0.0, atol=2e-4)


def test_other_configs_are_refused_in_a_line(tmp_path: Path, target: Path, exported_draft: Path) -> None:
    with pytest.raises(TrainError, match="no target here"):
        check_rope(tmp_path, exported_draft)
    with pytest.raises(TrainError, match=r"config.json: not the config of a draft .* Make one with `specx export`"):
        check_rope(target, tmp_path)
    for rope, reason in (({"rope_type": "dynamic", "factor": 2.0}, "dynamic"), ({"rope_type": "yarn"}, "factor")):
        draft = Path(shutil.copytree(exported_draft, tmp_path / reason))
        changed(draft, lambda c, rope=rope: c.update(rope_parameters=rope))
        with pytest.raises(TrainError, match=reason):
            check_rope(target, draft)


def test_the_command_prints_the_angles_and_exits_with_1_where_they_differ(
    specx: Specx, target: Path, tmp_path: Path, exported_draft: Path
) -> None:
    same = specx("rope-check", "--target", target, "--draft", exported_draft, "--json")
    assert same.returncode == 0, same.stderr
    assert (json.loads(same.stdout)["max_angle_error"], json.loads(same.stdout)["verdict"][:6]) == (0.0, "equal:")
    draft = changed(
        Path(shutil.copytree(exported_draft, tmp_path / "draft")), lambda c: c["rope_parameters"].pop("truncate")
    )
    differs = specx("rope-check", "--target", target, "--draft", draft)
    assert differs.returncode == 1
    assert differs.stdout.startswith("verdict ")
    (line,) = [line for line in differs.stderr.splitlines() if line.startswith("specx: ")]
    assert line.startswith(f"specx: {draft}: differs from the target: draft by ")
    assert "In its rope block truncate is missing, expected False." in line
