"""Reports of each kind, written once."""

import json
from pathlib import Path

import pytest

EVALUATION = {
    "acceptance_length": 2.94,
    "per_position": [0.88, 0.61, 0.45],
    "by_category": {"chat": 2.85, "<b>speech</b> with a name that is much too long for a phone": 3.47},
    "by_context": {"0-128": 2.92, "128-512": 2.95},
    "lossless": True,
    "tokens_per_s": 258.6,
    "baseline_tokens_per_s": 183.5,
    "requests": 40,
    "verifications": 3280,
    "table": [
        {
            "batch_size": 8, "category": "all", "requests": 40, "baseline_tokens_per_s": 183.5, "tokens_per_s": 258.6,
            "acceptance_length": 2.94, "delta_percent": 40.9,
        },
        {
            "batch_size": 64, "category": "all", "requests": 40, "baseline_tokens_per_s": None, "tokens_per_s": 1258.6,
            "acceptance_length": None, "delta_percent": None,
        },
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``specx evaluate --json`` prints, behind a line of another program."""
    path = tmp_path_factory.mktemp("evaluation") / "dev.json"
    path.write_text(f"loading\n{json.dumps(EVALUATION)}\n")
    return path


@pytest.fixture(scope="session")
def second_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A run with another loss, of a few steps."""
    from specx.train.config import TrainConfig
    from specx.train.pipeline import run

    out = tmp_path_factory.mktemp("run") / "lk"
    settings = {"max_steps": 6, "step_tokens": 2048, "draft_vocab_size": 256, "log_every": 2, "loss": "lk_lambda"}
    run(TrainConfig.model_validate(settings | {"store": str(tiny_store), "out": str(out), "ttt_steps": 2}))
    return out


@pytest.fixture(scope="session")
def reports(
    tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, trained_run: Path, second_run: Path, evaluation: Path
) -> dict[str, Path]:
    """Of a store, of a run, and of everything."""
    pytest.importorskip("plotly", reason="plotly draws the charts; pip install specx[report]")
    from specx.report.report import report

    out = tmp_path_factory.mktemp("reports")
    written = {
        "store": ([tiny_store], []),
        "run": ([trained_run], []),
        "all": ([trained_run, second_run, tiny_store], [evaluation]),
    }
    for name, (paths, evaluations) in written.items():
        report([str(path) for path in paths], out / f"{name}.html", evaluations)
    return {name: out / f"{name}.html" for name in written}
