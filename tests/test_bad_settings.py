"""Wrong settings: a line that names the option, the key or the run file; wrong usage exits with 2."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from specx import SpecxError
from specx.config import load_config
from specx.extract.config import ExtractConfig
from specx.train.config import TrainConfig

from .command import only_line

Specx = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ("boundries: [1, 3]", "boundries", "unknown key; the keys are .*boundaries"),
        ("top_k: many", "top_k", "valid integer"),
        ("top_k: 0", "top_k", "greater than or equal to 1"),
        ("boundaries: [3, 1]", "boundaries", "must be strictly increasing, got 3,1"),
        ("codec: zip", "codec", "'lossless', 'zstd', 'none', 'int8' or 'fp8'"),
    ],
)
def test_wrong_key_of_a_run_file_is_named(tmp_path: Path, content: str, key: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    options = {"target": "t", "data": ["d"], "store": "s"}
    with pytest.raises(SpecxError, match=f"^{path}: {key}: .*{message}"):
        load_config(ExtractConfig, path, options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected keys and values, found list"),
        (b"", "expected keys and values, found NoneType"),
        (b"a: [1", "not a readable YAML file"),
        (b"a: \xff", "not a readable YAML file"),
        (b"!!python/object/apply:os.getcwd []", "not a readable YAML file"),
    ],
)
def test_run_file_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecxError, match=f"^{path}: {message}"):
        load_config(TrainConfig, path, {})


@pytest.mark.parametrize(
    ("command", "options"),
    [("extract", ["--target", "t", "--data", "d", "--store", "s"]), ("train", ["--store", "s", "--out", "o"])],
)
def test_unknown_key_of_a_run_file_is_one_line(specx: Specx, tmp_path: Path, command: str, options: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rat: 1e-3\n")
    line = only_line(specx(command, *options, "--config", path))
    assert line.startswith(f"specx: {path}: learning_rat: unknown key; the keys are ")


@pytest.mark.parametrize(
    ("command", "options", "option"),
    [
        ("extract", ["--data", "d", "--store", "s"], "--target (target)"),
        ("extract", ["--target", "t", "--store", "s"], "--data (data)"),
        ("train", ["--out", "o"], "--store (store)"),
        ("evaluate", ["--target", "t", "--data", "d"], "--draft (draft)"),
        ("export", ["--out", "o"], "--run (run)"),
        ("rope-check", ["--draft", "d"], "--target (target)"),
        ("report", ["--out", "o"], "RUN|STORE... (paths)"),
    ],
)
def test_missing_option_is_named_in_one_line(specx: Specx, command: str, options: list[str], option: str) -> None:
    flag = option.split()[0]
    expected = f"specx: options: {option}: missing; give {flag} or the key in a run file"
    assert only_line(specx(command, *options)) == expected


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--boundaries", "3,1"], "options: --boundaries (boundaries): must be strictly increasing, got 3,1"),
        (["--shard", "4/4"], "options: --shard (shard): must be i/n with 0 <= i < n, got 4/4"),
        (["--top-k", "0"], "options: --top-k (top_k): Input should be greater than or equal to 1"),
        (["--config", "gone.yaml"], "gone.yaml: not a readable YAML file: "),
    ],
)
def test_option_out_of_range_is_named_in_one_line(specx: Specx, options: list[str], line: str) -> None:
    result = specx("extract", "--target", "t", "--data", "d", "--store", "s", *options)
    assert only_line(result).startswith(f"specx: {line}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "--boundaries", "1,two"], "expected integers such as 2,12,21"),
        (["extract", "--top-k", "many"], "Invalid value for '--top-k': Input should be a valid integer"),
        (["train", "--stroe", "s"], "No such option: --stroe"),
        (["extract", "--engine", "sglang"], "'sglang' is not one of 'auto', 'transformers', 'vllm'"),
        (["extract", "--engine-options", "64"], "expected KEY=VALUE"),
        (["export", "--run", "r", "--out", "o", "--dtype", "int4"], "'int4' is not one of"),
        (["store", "repair"], "No such command 'repair'"),
        (["teach"], "No such command 'teach'"),
    ],
)
def test_wrong_usage_exits_with_2(specx: Specx, arguments: list[str], message: str) -> None:
    result = specx(*arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
