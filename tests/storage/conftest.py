"""Made-up features: random bits in the shapes of a target with H = 16, L = 3, K = 4 and V = 64.

Programs that tests start in processes of their own run this file too and find the same functions.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, Origin, SequenceFeatures, TargetIdentity
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

INFO = DatasetInfo(
    target=TargetIdentity(architecture="MadeUpForCausalLM", config_hash="a" * 64, weights_hash="b" * 64),
    compute_dtype="bfloat16",
    boundaries=(1, 2, 4),
    hidden_size=16,
    vocab_size=64,
    top_k=4,
    codec="lossless",
)


def make_features(length: int, seed: int) -> SequenceFeatures:
    """Return ``length`` tokens; every bit of every array is random, so the floats hold NaN and infinities."""
    rng = np.random.default_rng(seed)
    L, H, K, V = len(INFO.boundaries), INFO.hidden_size, INFO.top_k, INFO.vocab_size
    return SequenceFeatures(
        input_ids=rng.integers(0, V, length, np.int32),
        loss_mask=rng.integers(0, 2, length, np.uint8),
        aux_hidden=rng.integers(0, 1 << 16, (length, L, H), np.uint16),
        last_hidden=rng.integers(0, 1 << 16, (length, H), np.uint16),
        topk_ids=rng.integers(0, V, (length, K), np.uint32),
        topk_logprob=rng.integers(0, 1 << 16, (length, K), np.uint16).view(np.float16),
        lse=rng.integers(0, 1 << 32, length, np.uint32).view(np.float32),
        argmax=rng.integers(0, V, length, np.int32),
    )


def sequence(i: int) -> SequenceFeatures:
    """Return sequence ``i`` of the stores that ``fill`` makes; 30 to 149 tokens."""
    return make_features(30 + 37 * i % 120, seed=i)


def origin(i: int) -> Origin:
    """Return where sequence ``i`` says it comes from."""
    return Origin(source="first.jsonl" if i % 2 else "second.jsonl", row=i, category="chat" if i % 3 else "")


def fill(path: str | Path, n: int, tokens_per_part: int, codec: str = "lossless") -> FeatureStore:
    """Add sequences 0 to ``n - 1`` to the store at ``path``, made if there is none, and return it."""
    store = FeatureStore.create(path, INFO.model_copy(update={"codec": codec}))
    with FeatureWriter(store, tokens_per_part=tokens_per_part) as writer:
        for i in range(n):
            writer.add(sequence(i), origin(i))
    return store


def assert_same(found: SequenceFeatures, expected: SequenceFeatures) -> None:
    """Compare shapes, dtypes and bits: a NaN equals itself."""
    for name, rows in expected.arrays().items():
        other = found.arrays()[name]
        assert (other.shape, other.dtype) == (rows.shape, rows.dtype), name
        assert other.tobytes() == rows.tobytes(), name


@pytest.fixture(scope="session", name="info")
def _info() -> DatasetInfo:
    return INFO


@pytest.fixture(scope="session", name="make_features")
def _make_features() -> Callable[[int, int], SequenceFeatures]:
    return make_features


@pytest.fixture(scope="session", name="sequence")
def _sequence() -> Callable[[int], SequenceFeatures]:
    return sequence


@pytest.fixture(scope="session", name="origin")
def _origin() -> Callable[[int], Origin]:
    return origin


@pytest.fixture(scope="session", name="fill")
def _fill() -> Callable[..., FeatureStore]:
    return fill


@pytest.fixture(scope="session", name="assert_same")
def _assert_same() -> Callable[[SequenceFeatures, SequenceFeatures], None]:
    return assert_same


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start a program in a process of its own; ``made`` is this file's namespace there."""

    def run(program: str, *arguments: object) -> subprocess.Popen[str]:
        prelude = f"import runpy, sys\nmade = runpy.run_path({str(Path(__file__))!r})\n"
        return subprocess.Popen(
            [sys.executable, "-c", prelude + program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.fixture
def expect_exactly() -> Callable[[str | Path, int], None]:
    """Check that a store is sound and holds sequences 0 to ``n - 1``, each once, bit for bit."""

    def check(path: str | Path, n: int) -> None:
        store = FeatureStore.open(path)
        assert verify(store).problems == []
        names = [bytes(row) for row in store.catalogue().ids]
        expected = [sequence(i) for i in range(n)]
        assert sorted(names) == sorted(sequence_id(features.input_ids) for features in expected)
        reader = FeatureReader(store)
        for features in expected:
            assert_same(reader.features(names.index(sequence_id(features.input_ids))), features)

    return check


@pytest.fixture
def local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path
