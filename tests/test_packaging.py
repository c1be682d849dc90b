"""What is installed, and what each part can do without."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from specx.storage.backends.durable import file_hash

Specx = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parent.parent

# Refuses to import what the extra `train` does not bring.
BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"vllm", "datasets", "ray"}:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Refuse())
from specx.cli import main
main()
"""


# The command line without what a compiler makes of it.
WITHOUT_A_COMPILER = """
import sys
sys.modules["specx.storage.codecs._pfor"] = None
from specx.cli import main
main()
"""


def hidden_states(store: Path) -> list[tuple[str, str]]:
    """Return path within the part and hash of each shard that holds some."""
    shards = [file for file in store.glob("parts/*/*_hidden/c/**/0") if file.is_file()]
    return sorted(("/".join(file.relative_to(store).parts[2:]), file_hash(file)) for file in shards)


def wheel_files(folder: Path, **environment: str) -> list[str]:
    """Build a wheel in a folder; return the names of what is in it."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "demo", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    (wheel,) = folder.glob("specx-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    names = wheel_files(tmp_path)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"specx"}
    assert {"specx/cli.py", "specx/storage/writer.py", "specx/train/evaluate/engines/vllm_engine.py"} <= set(names)
    assert "specx/report/page.html" in names
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("storage", "extract", "train", "report")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sources <= {name.removeprefix("specx/") for name in names}
    assert not [name for name in names if name.endswith(".c")]
    if importlib.util.find_spec("specx.storage.codecs._pfor"):
        assert "specx/storage/codecs/_pfor.abi3.so" in names


def test_where_there_is_no_compiler_the_wheel_lacks_only_what_one_makes(tmp_path: Path) -> None:
    names = wheel_files(tmp_path, CC="no-such-compiler")
    assert "specx/storage/codecs/pfor_numpy.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_where_there_was_no_compiler_a_store_is_read_and_written_as_elsewhere(
    tmp_path: Path, tiny_store: Path, specx: Specx
) -> None:
    prune = ["store", "prune", str(tiny_store), "--into"]
    assert specx(*prune, str(tmp_path / "elsewhere")).returncode == 0
    command = [sys.executable, "-c", WITHOUT_A_COMPILER, *prune, str(tmp_path / "here")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr.count("installed without a C compiler") == 1
    assert hidden_states(tmp_path / "here") == hidden_states(tmp_path / "elsewhere") != []


def test_training_and_export_need_neither_vllm_nor_datasets(tmp_path: Path, tiny_store: Path) -> None:
    run, draft = tmp_path / "run", tmp_path / "draft"
    for arguments in (
        ["train", "--store", tiny_store, "--out", run, "--max-steps", "2", "--batch-tokens", "1024"],
        ["export", "--run", run, "--out", draft],
    ):
        subprocess.run([sys.executable, "-c", BLOCKED, *map(str, arguments)], check=True, capture_output=True)
    assert (draft / "model.safetensors").is_file()
