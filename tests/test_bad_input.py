"""Whatever a user gets wrong is one line that says where, what was found and what was expected.

One case of each command goes through a process of its own; the others are the same error, raised here.
"""

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from specx import SpecxError
from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run as extract
from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.export.write import export
from specx.train.pipeline import TrainSummary
from specx.train.pipeline import run as train

from .command import only_line

Specx = Callable[..., subprocess.CompletedProcess[str]]

GOOD = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
SIZES: dict[str, Any] = {"step_tokens": 1024, "draft_vocab_size": 512, "max_steps": 2, "log_every": 1}


@pytest.fixture(scope="module")
def small_store(target: Path, regen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of twelve answers in one part; copy it before changing it."""
    store = tmp_path_factory.mktemp("small") / "store"
    extract(configured(target, regen / "train.parquet", store, limit=12))
    return store


@pytest.fixture(scope="module")
def small_run(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; copy it before changing it."""
    out = tmp_path_factory.mktemp("small") / "run"
    train(TrainConfig(store=str(small_store), out=str(out), **SIZES))
    return out


@pytest.fixture
def run_copy(small_run: Path, tmp_path: Path) -> Path:
    """The run of ``small_run``, to be damaged at will."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of one good row."""
    return write(tmp_path / "rows.jsonl", [GOOD])


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(target: Path, data: Path, store: Path, **settings: Any) -> ExtractConfig:
    return ExtractConfig(target=str(target), data=(str(data),), store=str(store), **settings)


def train_on(store: Path, out: Path, **settings: Any) -> TrainSummary:
    return train(TrainConfig(store=str(store), out=str(out), **(SIZES | settings)))


def evaluate_on(draft: Path, target: Path, data: Path) -> object:
    settings = EvaluateConfig(
        draft=str(draft), target=str(target), data=(str(data),), engine="transformers", max_new_tokens=2
    )
    return evaluate(settings)


def refusal(call: Callable[[], object]) -> str:
    """Return the one line a call is refused with."""
    with pytest.raises(SpecxError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rejected(store: Path) -> list[dict[str, Any]]:
    return [row for path in (store / "rejects").glob("*.parquet") for row in pq.read_table(path).to_pylist()]


def test_missing_target_is_one_line(specx: Specx, tmp_path: Path, rows: Path) -> None:
    line = only_line(specx("extract", "--target", tmp_path / "gone", "--data", rows, "--store", tmp_path / "store"))
    assert line == f"specx: {tmp_path}/gone: no such directory. Give --target a model's directory or hub id."
    assert not (tmp_path / "store").exists()


def test_row_outside_the_vocabulary_is_counted_and_the_run_goes_on(specx: Specx, target: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [GOOD, {"input_ids": [5, 2048], "loss_mask": [0, 1]}])
    result = specx("extract", "--target", target, "--data", data, "--store", tmp_path / "store", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["sequences"], summary["rejected"]) == (1, 1)
    (reject,) = rejected(tmp_path / "store")
    assert (reject["source"], reject["row"], reject["reason"]) == (str(data), 1, "id_out_of_range")
    assert "2048" in reject["detail"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boundaries": (0, 3)}, "boundary 0 of 6 blocks, expected 1 to 5"),
        ({"boundaries": (1, 6)}, "boundary 6 of 6 blocks, expected 1 to 5"),
        ({"top_k": 2049}, "top_k 2049 is larger than the vocabulary, 2048"),
        ({"store": "gs://bucket/store"}, "gs://bucket/store: neither a path nor s3://BUCKET/PREFIX"),
    ],
)
def test_settings_the_target_cannot_do_are_refused_before_anything_is_written(
    target: Path, tmp_path: Path, rows: Path, settings: dict[str, Any], message: str
) -> None:
    wanted = {"target": target, "data": rows, "store": tmp_path / "store"} | settings
    assert message in refusal(lambda: extract(configured(**wanted)))
    assert not (tmp_path / "store").exists()


def test_store_that_is_something_else_is_refused(target: Path, tmp_path: Path, rows: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    for store in (tmp_path / "full", rows, rows / "store"):
        assert refusal(lambda: extract(configured(target, rows, store))).startswith(f"{store}: ")  # noqa: B023
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert json.loads(rows.read_text()) == GOOD


def test_store_of_another_target_is_refused_and_left_alone(target: Path, small_store: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(target, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    data = write(tmp_path / "rows.jsonl", [GOOD])
    message = refusal(lambda: extract(configured(other, data, store)))
    assert "target.weights_hash is" in message
    assert "config_hash" not in message
    assert "Use another --store" in message
    assert len(FeatureStore.open(store).catalogue()) == 12
    for settings in ({"dtype": "float32"}, {"top_k": 7}, {"boundaries": (1, 2)}):
        found = refusal(lambda: extract(configured(target, data, store, **settings)))  # noqa: B023
        assert next(iter(settings)) in found


@pytest.mark.parametrize("command", ["info", "verify"])
def test_path_without_a_store_is_one_line(specx: Specx, tmp_path: Path, command: str) -> None:
    line = only_line(specx("store", command, tmp_path))
    assert line.startswith(f"specx: {tmp_path}: no feature store here (dataset.json is missing)")


def test_training_on_a_damaged_store_names_the_file(specx: Specx, small_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    (shard,) = (store / "parts").glob("*/aux_hidden/c/0/0/0")
    flip_byte(shard, 1000)
    result = specx(
        "train", "--store", store, "--out", tmp_path / "run", "--epochs", 1, "--batch-tokens", 1024,
        "--draft-vocab-size", 512,
    )  # fmt: skip
    line = only_line(result)
    assert line.startswith(f"specx: {shard}: the checksum of chunk (0, 0) does not match its bytes")
    assert "specx store verify" in line


def test_store_that_training_cannot_use_is_named(small_store: Path, target: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert f"{tmp_path}/gone: no feature store here" in refusal(lambda: train_on(tmp_path / "gone", out))
    message = refusal(lambda: train_on(small_store, out, boundaries=(1, 2)))
    assert f"{small_store}: boundary 2 is not in the store, which has 1,3,5" in message
    only_bad = write(tmp_path / "rows.jsonl", [{"input_ids": [5], "loss_mask": [1]}])
    extract(configured(target, only_bad, tmp_path / "empty"))
    assert f"{tmp_path}/empty: no sequences to train on" in refusal(lambda: train_on(tmp_path / "empty", out))


def test_place_for_a_run_that_is_taken_is_refused(small_store: Path, tmp_path: Path, rows: Path) -> None:
    assert f"{tmp_path}: not empty and not a run" in refusal(lambda: train_on(small_store, tmp_path))
    assert refusal(lambda: train_on(small_store, rows)).startswith(f"{rows}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_other_run_in_the_same_place_is_refused(small_store: Path, run_copy: Path) -> None:
    message = refusal(lambda: train_on(small_store, run_copy, lr=0.5))
    assert f"{run_copy}: this run was begun with lr = 0.0001, now it is 0.5" in message


@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_refused_unrun(run_copy: Path, tmp_path: Path, is_zip: bool) -> None:
    trap, checkpoint = Trap(tmp_path / "marker"), run_copy / "checkpoints" / "last.ckpt"
    if is_zip:
        torch.save({"state_dict": trap}, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps(trap, protocol=2))
    message = refusal(lambda: export(run_copy, tmp_path / "draft"))
    assert message.startswith(f"{checkpoint}: not a checkpoint of specx")
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "draft").exists()


def test_code_in_a_checkpoint_is_refused_unrun_by_every_command(
    specx: Specx, small_store: Path, run_copy: Path, tmp_path: Path
) -> None:
    checkpoint = run_copy / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": Trap(tmp_path / "marker")}, checkpoint)
    line = only_line(specx("export", "--run", run_copy, "--out", tmp_path / "draft"))
    assert line.startswith(f"specx: {checkpoint}: not a checkpoint of specx")
    (run_copy / "result.json").unlink()
    assert f"{checkpoint}: not a checkpoint of specx" in refusal(lambda: train_on(small_store, run_copy))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 cut short"], ids=["empty", "text", "cut"])
def test_damaged_checkpoint_is_named(run_copy: Path, tmp_path: Path, content: bytes) -> None:
    checkpoint = run_copy / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(content)
    message = refusal(lambda: export(run_copy, tmp_path / "draft"))
    assert message.startswith(f"{checkpoint}: not a checkpoint of specx")


@pytest.mark.parametrize("content", [{"weights": 1}, [1]], ids=["dict", "list"])
def test_checkpoint_of_another_program_is_named(run_copy: Path, tmp_path: Path, content: object) -> None:
    checkpoint = run_copy / "checkpoints" / "last.ckpt"
    torch.save(content, checkpoint)
    message = refusal(lambda: export(run_copy, tmp_path / "draft"))
    assert message.startswith(f"{checkpoint}: not a checkpoint of specx")


def test_export_needs_a_run_a_checkpoint_and_a_free_place(run_copy: Path, tmp_path: Path, rows: Path) -> None:
    draft = tmp_path / "draft"
    assert f"{tmp_path}/gone/draft.json: not the draft of a run" in refusal(lambda: export(tmp_path / "gone", draft))
    assert f"{tmp_path}: exists. Choose another --out" in refusal(lambda: export(run_copy, tmp_path))
    assert refusal(lambda: export(run_copy, rows / "draft")).startswith(f"{rows}: ")
    (run_copy / "checkpoints" / "last.ckpt").unlink()
    assert "last.ckpt: no checkpoint yet" in refusal(lambda: export(run_copy, draft))
    assert not draft.exists()


def test_evaluation_without_its_data_is_one_line(specx: Specx, target: Path, small_run: Path, tmp_path: Path) -> None:
    data, draft = tmp_path / "gone.jsonl", tmp_path / "draft"
    export(small_run, draft)
    line = only_line(specx("evaluate", "--draft", draft, "--target", target, "--data", data))
    assert line == f"specx: {data}: no such file. Give --data a Parquet or JSON-lines file."


def test_evaluation_without_a_draft_or_with_other_data_is_refused(
    target: Path, small_run: Path, tmp_path: Path, rows: Path
) -> None:
    draft = tmp_path / "draft"
    assert f"{draft}: no readable config.json. Give --draft" in refusal(lambda: evaluate_on(draft, target, rows))
    assert f"{tmp_path}: no readable config.json. Give --target" in refusal(lambda: evaluate_on(draft, tmp_path, rows))
    assert "--draft takes a draft that `specx export` wrote" in refusal(lambda: evaluate_on(target, target, rows))
    export(small_run, draft)
    assert "--target takes the target, not a draft" in refusal(lambda: evaluate_on(draft, draft, rows))
    other = write(tmp_path / "other.jsonl", [{"id": 1, "question": "Hello"}])
    message = refusal(lambda: evaluate_on(draft, target, other))
    assert message.startswith(f"{other}: no column of input_ids and loss_mask, messages")
    assert message.endswith("among id, question.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 2048, 7], "loss_mask": [0, 0, 1]}, "token id 2048, the vocabulary"),
        ({"input_ids": None, "loss_mask": None}, "row 1 has no input_ids"),
    ],
    ids=["outside the vocabulary", "null"],
)
def test_prompt_that_the_target_cannot_read_is_named(
    target: Path, small_run: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    export(small_run, tmp_path / "draft")
    data = write(tmp_path / "rows.jsonl", [GOOD, row])
    assert f"{data}: {message}" in refusal(lambda: evaluate_on(tmp_path / "draft", target, data))
