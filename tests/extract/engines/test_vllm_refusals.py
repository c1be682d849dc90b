"""What the vLLM engine refuses before it starts."""

import sys
from pathlib import Path

import pytest

from specx.extract.config import ExtractConfig
from specx.extract.engines.base import EngineError
from specx.extract.pipeline import run


def test_without_vllm_its_install_is_told(
    target: Path, regen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = ExtractConfig(
        target=str(target), data=(str(regen / "dev.parquet"),), store=str(tmp_path / "store"), engine="vllm"
    )
    with pytest.raises(EngineError, match=r"vllm cannot be imported .* `pip install specx\[vllm\]`"):
        run(config)


def test_pipeline_stages_are_refused_and_tensor_parallel_named(target: Path, regen: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    config = ExtractConfig(
        target=str(target), data=(str(regen / "dev.parquet"),), store=str(store), engine="vllm", pipeline_parallel=2
    )
    with pytest.raises(
        EngineError, match=r"--pipeline-parallel 2: vLLM takes .* one pipeline stage only. Use --tensor"
    ):
        run(config)
