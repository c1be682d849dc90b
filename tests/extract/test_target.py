"""A target is known by what it computes, and the store gets exactly its head and tokenizer."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from specx import SpecxError
from specx.extract.target import Target, copy_into, identify, open_target, read_head, resolve_boundaries
from specx.hub import TargetError
from specx.storage.schema import DatasetInfo
from specx.storage.store import FeatureStore

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(target: Path, tmp_path: Path) -> Path:
    """The tiny target, to be changed at will."""
    return Path(shutil.copytree(target, tmp_path / "target"))


def edit_weights(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def reshard(directory: Path) -> None:
    """Split the one file of a target into two and an index, the tensors of both in another order."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)


def write_index(directory: Path, weight_map: Mapping[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def of_layers(layers: int) -> Target:
    return Target(path=Path("target"), config={"num_hidden_layers": layers}, files={}, dtype="bfloat16")


def info_of(target: Target) -> DatasetInfo:
    return DatasetInfo(
        target=identify(target),
        compute_dtype="bfloat16",
        boundaries=(1, 3, 5),
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        top_k=4,
        codec="none",
    )


def test_identity_survives_resharding(target: Path, copy: Path) -> None:
    reshard(copy)
    assert len(set(open_target(str(copy)).files.values())) == 2
    assert identify(open_target(str(copy))) == identify(open_target(str(target)))


def test_head_is_found_in_whatever_shard_it_lies(target: Path, copy: Path) -> None:
    reshard(copy)
    whole, split = read_head(open_target(str(target))), read_head(open_target(str(copy)))
    assert list(whole) == list(split)
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_identity_changes_with_one_bit_of_one_weight(target: Path, copy: Path) -> None:
    def flip(tensors: Tensors) -> None:
        tensors["model.layers.3.self_attn.q_proj.weight"].view(torch.int16)[7, 11] ^= 1

    edit_weights(copy, flip)
    before, after = identify(open_target(str(target))), identify(open_target(str(copy)))
    assert before.weights_hash != after.weights_hash
    assert before.config_hash == after.config_hash


@pytest.mark.parametrize(
    ("values", "is_same"),
    [
        ({"transformers_version": "99.0"}, True),
        ({"use_cache": False}, True),
        ({"_name_or_path": "elsewhere"}, True),
        ({"rms_norm_eps": 1e-6}, False),
        ({"sliding_window": 32}, False),
    ],
)
def test_identity_changes_with_config_that_changes_the_model(
    target: Path, copy: Path, values: dict[str, Any], is_same: bool
) -> None:
    edit_config(copy, **values)
    assert (identify(open_target(str(copy))) == identify(open_target(str(target)))) is is_same


@pytest.mark.parametrize(
    ("layers", "boundaries"),
    [
        (2, (1,)),
        (3, (1, 2)),
        (4, (1, 2, 3)),
        (6, (1, 3, 5)),
        (7, (1, 3, 6)),
        (8, (2, 4, 5)),
        (24, (2, 12, 21)),
        (32, (2, 16, 29)),
        (36, (2, 18, 33)),
    ],
)
def test_default_boundaries_are_low_middle_and_high(layers: int, boundaries: tuple[int, ...]) -> None:
    assert resolve_boundaries(of_layers(layers), None) == boundaries


def test_default_boundaries_are_inputs_of_blocks_behind_the_first() -> None:
    for layers in range(2, 100):
        boundaries = resolve_boundaries(of_layers(layers), None)
        assert list(boundaries) == sorted(set(boundaries))
        assert resolve_boundaries(of_layers(layers), boundaries) == boundaries


def test_target_of_one_block_has_no_boundary() -> None:
    with pytest.raises(TargetError, match="boundary 1 of 1 blocks"):
        resolve_boundaries(of_layers(1), None)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((0, 3), r"boundary 0 of 6 blocks, expected 1 to 5: .* the embedding"),
        ((1, 6), r"boundary 6 of 6 blocks, expected 1 to 5: .* no such block"),
        ((-1,), r"boundary -1 of 6 blocks, expected 1 to 5"),
    ],
)
def test_boundary_that_no_block_has_is_refused(wanted: tuple[int, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve_boundaries(of_layers(6), wanted)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/inside.safetensors"])
def test_index_that_names_a_file_outside_the_folder_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / "sub").mkdir()
    shutil.copyfile(copy / WEIGHTS, copy / "sub" / "inside.safetensors")
    shutil.copyfile(copy / WEIGHTS, tmp_path / "outside.safetensors")
    write_index(
        copy, {"model.norm.weight": name.replace("/outside", f"{tmp_path}/outside") if name[0] == "/" else name}
    )
    with pytest.raises(TargetError, match=rf"{INDEX}: names .*side\.safetensors', which is not a file of {copy}"):
        open_target(str(copy))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_index_that_is_none_is_refused(copy: Path, content: str) -> None:
    (copy / INDEX).write_text(content)
    with pytest.raises(TargetError, match=f"{INDEX}: not a safetensors index"):
        open_target(str(copy))


def test_tied_head_is_the_embedding(copy: Path) -> None:
    edit_config(copy, tie_word_embeddings=True)
    edit_weights(copy, lambda tensors: tensors.pop("lm_head.weight"))
    head = read_head(open_target(str(copy)))
    assert torch.equal(head["lm_head"], head["embed_tokens"])
    assert torch.equal(head["embed_tokens"], load_file(copy / WEIGHTS)["model.embed_tokens.weight"])


def test_untied_target_without_a_head_is_refused(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(TargetError, match=r"no tensor lm_head\.weight"):
        read_head(open_target(str(copy)))


def test_store_holds_config_tokenizer_and_head_bit_for_bit(tiny_store: Path, target: Path) -> None:
    held = FeatureStore.open(tiny_store).target_directory
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (held / name).read_bytes() == (target / name).read_bytes()
    head, weights = load_file(held / "head.safetensors"), load_file(target / WEIGHTS)
    names = {
        "embed_tokens": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
    }
    assert head.keys() == names.keys()
    for name, original in names.items():
        assert head[name].dtype == weights[original].dtype
        assert torch.equal(head[name].view(torch.int16), weights[original].view(torch.int16))


def test_config_that_leaves_defaults_to_transformers_is_completed(target: Path, copy: Path, tmp_path: Path) -> None:
    path = copy / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    del values["num_key_value_heads"]
    theta = rope["rope_theta"]
    older = {"rope_theta": theta, "rope_scaling": {key: rope[key] for key in rope if key != "rope_theta"}}
    path.write_text(json.dumps(values | older))
    store = FeatureStore.create(tmp_path / "store", info_of(open_target(str(copy))))
    copy_into(open_target(str(copy)), store)
    held = store.target_directory
    completed = json.loads((held / "config.json").read_text())
    assert completed["rope_parameters"] == rope
    assert str(tmp_path) not in json.dumps(completed)
    read, original = (AutoConfig.from_pretrained(each).to_dict() for each in (held, copy))
    different = {key for key in read.keys() | original.keys() if read.get(key) != original.get(key)}
    assert different <= {"_name_or_path", "transformers_version"}


def test_config_that_transformers_cannot_read_is_refused(copy: Path, tmp_path: Path) -> None:
    edit_config(copy, model_type="unheard_of")
    target = open_target(str(copy))
    store = FeatureStore.create(tmp_path / "store", info_of(target))
    with pytest.raises(TargetError, match=rf"^{copy}/config\.json: transformers cannot read it: .*unheard_of"):
        copy_into(target, store)


def test_unfinished_copy_of_the_target_is_never_taken_for_a_whole_one(target: Path, copy: Path, tmp_path: Path) -> None:
    whole = open_target(str(target))
    store = FeatureStore.create(tmp_path / "store", info_of(whole))
    edit_weights(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(TargetError):
        copy_into(open_target(str(copy)), store)
    assert not store.has_target
    copy_into(whole, store)
    assert (store.target_directory / "head.safetensors").exists()
    assert [path.name for path in (tmp_path / "store").iterdir() if path.name.startswith(".")] == []


def damage(directory: Path, name: str, content: bytes | None) -> None:
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config\.json is missing"),
        ("config.json", b"{", r"config\.json: not JSON"),
        ("config.json", b"[]", r"config\.json: "),
        ("config.json", b'{"architectures": ["LlamaForCausalLM"]}', "num_hidden_layers is None, expected an integer"),
        ("config.json", b'{"architectures": ["BertModel"]}', "unknown architecture BertModel, expected one of GptOss"),
        ("config.json", b"{}", "unknown architecture none"),
        (WEIGHTS, None, r"no \*\.safetensors"),
        (WEIGHTS, b"garbage", r"model\.safetensors: not a readable safetensors file"),
    ],
)
def test_unusable_target_is_named_with_what_it_lacks(
    copy: Path, name: str, content: bytes | None, message: str
) -> None:
    damage(copy, name, content)
    with pytest.raises(SpecxError, match=f"^{copy}.*{message}"):
        open_target(str(copy))


def test_truncated_weights_are_refused(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    damage(copy, WEIGHTS, content[: len(content) // 2])
    with pytest.raises(TargetError, match=r"model\.safetensors: not a readable safetensors file"):
        open_target(str(copy))
