"""What is installed, and what each part can do without."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "data", "demo", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tree]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("specx-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"specx"}
    assert {"specx/cli.py", "specx/storage/writer.py", "specx/train/evaluate/vllm.py"} <= set(names)
    assert "specx/report/page.html" in names
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("storage", "extract", "train", "report")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sources <= {name.removeprefix("specx/") for name in names}


def test_training_and_export_need_neither_vllm_nor_datasets(tmp_path: Path, tiny_store: Path) -> None:
    run, draft = tmp_path / "run", tmp_path / "draft"
    for arguments in (
        ["train", "--store", tiny_store, "--out", run, "--max-steps", "2", "--batch-tokens", "1024"],
        ["export", "--run", run, "--out", draft],
    ):
        subprocess.run([sys.executable, "-c", BLOCKED, *map(str, arguments)], check=True, capture_output=True)
    assert (draft / "model.safetensors").is_file()
