"""The public names: loaded when used, callable whatever was imported before, and typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import specx

HEAVY = ("torch", "numpy", "pyarrow", "pydantic", "transformers", "lightning", "zarr")

USER = """
import specx

store = specx.open_store("features")
reveal_type(store)
reveal_type(len(store))
dataset = specx.FeatureDataset(store, view="train")
reveal_type(dataset[0])
for batch in specx.packed_batches(store, batch_tokens=1024, seed=0):
    reveal_type(batch.aux_hidden)
config = specx.TrainConfig(store=("features",), out="runs/a", max_steps=10)
summary = specx.train(config)
reveal_type(summary.acceptance_length)
draft = specx.load_draft("drafts/a")
reveal_type(draft.spec.boundaries)
wrong: int = specx.open_store("features")
specx.train("no config")
"""
REVEALED = [
    "specx.storage.store.FeatureStore",
    "int",
    "dict[str, torch._tensor.Tensor]",
    "torch._tensor.Tensor",
    "float",
    "tuple[int, ...]",
]


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_loads_no_library() -> None:
    script = f"import specx, sys, json; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    assert json.loads(run(script)) == []


def test_every_public_name_is_there_and_listed() -> None:
    for name in specx.__all__:
        assert getattr(specx, name) is not None
        assert name in dir(specx)
    assert not hasattr(specx, "no_such_name")


def test_train_and_extract_are_called_whatever_was_imported_before() -> None:
    for before in ("", "import specx.train.pipeline, specx.extract.pipeline", "import specx.train.config"):
        script = f"""
{before}
import specx
for function, config in ((specx.train, specx.TrainConfig), (specx.extract, specx.ExtractConfig)):
    assert callable(function), function
import specx.train.pipeline, specx.extract.config
try:
    specx.train(specx.TrainConfig(store="nowhere", out="run"))
except specx.SpecxError as error:
    print(error)
"""
        assert "nowhere: no feature store here" in run(script)


def test_a_type_checker_knows_the_types(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    root = Path(specx.__file__).parent
    # With the settings and the cache of `make lint`, what torch declares is read once.
    options = ["--strict", "--config-file", root / "pyproject.toml", "--cache-dir", root / ".mypy_cache"]
    command = [sys.executable, "-m", "mypy", *options, "user.py"]
    # mypy does not follow the import hook of an editable install; a wheel it finds by itself.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "specx").symlink_to(root)
    environment = os.environ | {"MYPYPATH": str(tmp_path / "site")}
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in checked.stdout.splitlines() if line.startswith("user.py")]
    revealed = [line.partition("Revealed type is ")[2].strip('"') for line in lines if "Revealed type" in line]
    assert [each.replace("builtins.", "") for each in revealed] == REVEALED, checked.stdout[-3000:]
    errors = [line for line in lines if ": error:" in line]
    assert len(errors) == 2, checked.stdout[-3000:]
    assert 'Incompatible types in assignment (expression has type "FeatureStore"' in errors[0]
    assert 'Argument 1 to "run"' in errors[1]


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(specx.__file__).parent / "py.typed").is_file()
