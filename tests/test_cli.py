"""The command line: quick help, one JSON object, and ^C that keeps what was done."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from specx import __version__
from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run
from specx.storage.ops.verify import verify
from specx.storage.store import FeatureStore

from .program import SPECX

Specx = Callable[..., subprocess.CompletedProcess[str]]

COMMANDS = (
    "extract",
    "train",
    "export",
    "evaluate",
    "store",
    "store info",
    "store verify",
    "store plan",
    "regenerate",
    "rope-check",
    "report",
    "store select",
    "store merge",
    "store prune",
    "store gc",
)
HEAVY = ("torch", "numpy", "zarr", "transformers", "datasets", "lightning", "pyarrow", "safetensors", "vllm", "plotly")
SCRIPT = """
import io, json, sys
from contextlib import redirect_stdout
from specx.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["specx", *command.split(), "--help"]
    out, code = io.StringIO(), None
    try:
        with redirect_stdout(out):
            main()
    except SystemExit as exit:
        code = exit.code
    loaded = [name for name in json.loads(HEAVY) if name in sys.modules]
    print(json.dumps([command, code, "Usage" in out.getvalue(), loaded]))
"""


def last_line(result: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert "Traceback" not in result.stderr
    summary: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return summary


def assert_runs(script: str) -> None:
    """Run a script in a process of its own, to its end and without a word."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_help_of_every_command_loads_nothing_heavy() -> None:
    script = SCRIPT.replace("HEAVY", repr(json.dumps(HEAVY)))
    arguments = json.dumps(["", *COMMANDS])
    result = subprocess.run(
        [sys.executable, "-c", script, arguments], capture_output=True, text=True, timeout=300, check=True
    )
    reported = [json.loads(line) for line in result.stdout.splitlines()]
    assert reported == [[command, 0, True, []] for command in ("", *COMMANDS)]


def test_the_list_of_commands_loads_no_settings() -> None:
    script = (
        "import io, sys\n"
        "from contextlib import redirect_stdout\n"
        "from specx.cli import main\n"
        "sys.argv = ['specx', '--help']\n"
        "with redirect_stdout(io.StringIO()) as out:\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as exit:\n"
        "        assert exit.code == 0\n"
        "assert 'rope-check' in out.getvalue()\n"
        "assert not {'pydantic', 'yaml', 'specx.config', 'torch'} & set(sys.modules)\n"
    )
    assert_runs(script)


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "specx", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == f"specx {__version__}\n"


def test_training_is_imported_without_transformers() -> None:
    script = (
        "import sys\n"
        "from specx.startup import without_text_metrics\n"
        "with without_text_metrics():\n"
        "    import specx.train.pipeline\n"
        "assert 'lightning' in sys.modules and 'torchmetrics' in sys.modules\n"
        "assert 'transformers' not in sys.modules and 'datasets' not in sys.modules\n"
        "from lightning_utilities.core.imports import RequirementCache\n"
        "assert RequirementCache('transformers>=4.0')\n"
    )
    assert_runs(script)


def test_torch_is_imported_when_its_library_is_loaded() -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from specx.startup import import_torch\n"
        "def is_loaded():\n"
        "    return 'sympy' in sys.modules and 'libtorch_cpu' in Path('/proc/self/maps').read_text()\n"
        "class Watch:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch._C':\n"
        "            seen.append(is_loaded())\n"
        "seen = []\n"
        "sys.meta_path.insert(0, Watch())\n"
        "assert not is_loaded()\n"
        "import_torch()\n"
        "assert seen == [True], seen\n"
        "assert sys.modules['torch'].ones(2).sum() == 2\n"
    )
    assert_runs(script)


def test_collector_does_not_run_while_training_is_imported() -> None:
    script = (
        "import gc\n"
        "from specx.startup import without_collector\n"
        "runs = []\n"
        "gc.callbacks.append(lambda phase, info: runs.append(phase))\n"
        "with without_collector():\n"
        "    import zarr\n"
        "assert not runs, runs\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 10_000, gc.get_freeze_count()\n"
    )
    assert_runs(script)


def test_version_is_printed(specx: Specx) -> None:
    result = specx("--version")
    assert (result.returncode, result.stdout) == (0, f"specx {__version__}\n")


def test_extract_prints_its_summary_as_the_last_line(specx: Specx, target: Path, regen: Path, tmp_path: Path) -> None:
    result = specx(
        "extract", "--target", target, "--data", regen / "train.parquet", "--data", regen / "conversations.jsonl",
        "--store", tmp_path / "store", "--limit", 2, "--boundaries", "2,4", "--top-k", 8, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = last_line(result)
    assert list(summary) == [
        "sequences",
        "tokens",
        "reused",
        "rejected",
        "bytes_per_token",
        "tokens_per_s",
        "seconds",
        "writer_wait_fraction",
    ]
    store = FeatureStore.open(tmp_path / "store")
    assert (store.info.boundaries, store.info.top_k) == ((2, 4), 8)
    assert (summary["sequences"], summary["tokens"]) == (2, int(store.catalogue().length.sum()))
    assert len(result.stdout.splitlines()) == 1


def test_options_override_the_run_file(specx: Specx, target: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [5, 6], "loss_mask": [0, 1]}))
    settings = {"target": "gone", "data": [str(tmp_path / "rows.jsonl")], "store": str(tmp_path / "store"), "top_k": 4}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    result = specx("extract", "--config", tmp_path / "run.yaml", "--target", target)
    assert result.returncode == 0, result.stderr
    assert FeatureStore.open(tmp_path / "store").info.top_k == 4
    assert result.stdout.splitlines()[0].split() == ["sequences", "1"]


def test_store_info_describes_the_store(specx: Specx, tiny_store: Path) -> None:
    result = specx("store", "info", tiny_store, "--json")
    assert result.returncode == 0, result.stderr
    summary = last_line(result)
    expected = {"sequences": 120, "boundaries": [1, 3, 5], "hidden_size": 128, "vocab_size": 2048, "codec": "lossless"}
    assert {key: summary[key] for key in expected} == expected
    assert sum(summary["bytes_by_array"].values()) == summary["bytes"]
    for line in specx("store", "info", tiny_store).stdout.splitlines():
        assert line.split()[0] in summary


def test_a_command_takes_its_settings_from_a_run_file_alone(specx: Specx, tiny_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"store: {tiny_store}\n")
    result = specx("store", "info", "--config", path, "--json")
    assert result.returncode == 0, result.stderr
    missing = specx("store", "info")
    assert missing.returncode == 1
    assert missing.stderr == "specx: options: STORE (store): missing; give STORE or the key in a run file\n"


def test_store_verify_exits_with_1_where_there_is_damage(specx: Specx, store_copy: Path) -> None:
    sound = specx("store", "verify", store_copy, "--json")
    assert sound.returncode == 0, sound.stderr
    assert (last_line(sound)["sequences"], last_line(sound)["problems"]) == (120, [])
    shard = sorted((store_copy / "parts").glob("*/topk_ids/c/0/0"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    damaged = specx("store", "verify", store_copy, "--json")
    assert damaged.returncode == 1
    (problem,) = last_line(damaged)["problems"]
    assert problem.startswith(f"{shard}: its hash is ")
    assert damaged.stderr.splitlines()[-1].startswith(f"specx: {store_copy}: 1 damaged: {shard}")


def test_interrupted_extraction_keeps_its_units_and_the_rerun_completes(
    target: Path, regen: Path, tmp_path: Path
) -> None:
    store, rows = tmp_path / "store", 120
    (tmp_path / "run.yaml").write_text("tokens_per_part: 1000\n")
    process = subprocess.Popen(
        [
            *SPECX, "extract",
            "--target", target, "--data", regen / "train.parquet", "--store", store,
            "--limit", str(rows), "--config", tmp_path / "run.yaml",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (store / "commits" / "u000001.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "interrupted" in stderr.splitlines()[-1]
    opened = FeatureStore.open(store)
    kept = len(opened.catalogue())
    assert 0 < kept < rows
    assert verify(opened).problems == []
    summary = run(
        ExtractConfig(
            target=str(target),
            data=(str(regen / "train.parquet"),),
            store=str(store),
            limit=rows,
            tokens_per_part=1000,
        )
    )
    assert (summary.sequences, summary.reused, summary.rejected) == (rows - kept, kept, 0)
    whole = verify(FeatureStore.open(store))
    assert (whole.problems, whole.unreferenced, whole.sequences) == ([], [], rows)
