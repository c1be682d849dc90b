"""The guide to the Python API, run as it is written."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "python.md"


def test_the_code_of_the_guide_runs_in_order(
    tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    shutil.copytree(tiny_store, tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{GUIDE.name}, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "120 sequences" in printed
    assert "10 steps, acceptance length" in printed
    assert re.search(r"drafted: \[\d+, \d+, \d+\]", printed)
    assert "no-such-store: no feature store here" in printed
    assert (tmp_path / "drafts" / "a" / "model.safetensors").is_file()
