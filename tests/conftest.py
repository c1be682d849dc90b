"""What the tests share: the tiny target, and a store, a run and a draft made once from it."""

import os

# Set before anything imports the libraries: nothing may be fetched, nothing reported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"

Specx = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def target() -> Path:
    """Directory of the tiny trained gpt-oss."""
    return DATA / "tiny-gpt-oss"


@pytest.fixture(scope="session")
def regen() -> Path:
    """Directory of its regenerated answers."""
    return DATA / "regen"


@pytest.fixture(scope="session")
def specx() -> Specx:
    """Run the command line in a process of its own and return what it printed."""

    def run(*arguments: str | Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from specx.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path) -> Path:
    """A store of the first 120 answers in three parts; copy it before changing it."""
    from specx.extract.config import ExtractConfig
    from specx.extract.pipeline import run

    store = tmp_path_factory.mktemp("store") / "tiny"
    data = (str(regen / "train.parquet"),)
    run(ExtractConfig(target=str(target), data=data, store=str(store), limit=120, tokens_per_part=10_000))
    return store


@pytest.fixture
def store_copy(tmp_path: Path, tiny_store: Path) -> Path:
    """The store of ``tiny_store``, to be damaged at will."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A run of 60 steps on ``tiny_store``, in float32."""
    from specx.train.config import TrainConfig
    from specx.train.pipeline import run

    out = tmp_path_factory.mktemp("run") / "eagle3"
    run(
        TrainConfig(
            store=str(tiny_store), out=str(out), max_steps=60, batch_tokens=2048, draft_vocab_size=1024, lr=3e-3
        )
    )
    return out


@pytest.fixture(scope="session")
def exported_draft(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """The draft of ``trained_run`` as exported."""
    from specx.train.export import export

    out = tmp_path_factory.mktemp("draft") / "eagle3"
    export(trained_run, out)
    return out
