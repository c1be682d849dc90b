"""The engines on a GPU: vLLM is chosen by itself, and gives what transformers gives within bfloat16's rounding."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from specx.storage.reader import FeatureReader
from specx.storage.schema import Array, SequenceFeatures
from specx.storage.store import FeatureStore

pytestmark = pytest.mark.gpu

SEQUENCES = 100


def by_id(store: Path) -> dict[bytes, SequenceFeatures]:
    reader = FeatureReader(FeatureStore.open(store))
    return {bytes(identifier): reader.features(number) for number, identifier in enumerate(reader.catalogue.ids)}


def floats(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory,
    specx: Callable[..., CompletedProcess[str]],
    target: Path,
    regen: Path,
) -> dict[str, dict[bytes, SequenceFeatures]]:
    """The same sequences from the engine that is chosen by default, and from transformers, on the GPU."""
    found = {}
    for name, options in (("default", ()), ("transformers", ("--engine", "transformers"))):
        path = tmp_path_factory.mktemp(name) / "store"
        data = ("--data", regen / "train.parquet", "--limit", str(SEQUENCES))
        done = specx("extract", "--target", target, *data, "--store", path, *options, "--json", timeout=600)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["sequences"] == SEQUENCES
        found[name] = by_id(path)
    return found


def test_vllm_on_a_gpu_gives_the_features_of_transformers(
    stores: dict[str, dict[bytes, SequenceFeatures]],
) -> None:
    assert stores["default"].keys() == stores["transformers"].keys()
    same = tokens = 0
    for identifier, expected in stores["transformers"].items():
        found = stores["default"][identifier]
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.loss_mask, expected.loss_mask)
        for name in ("aux_hidden", "last_hidden"):
            theirs, ours = floats(getattr(expected, name)), floats(getattr(found, name))
            assert np.linalg.norm(ours - theirs) <= 0.03 * np.linalg.norm(theirs), name
        np.testing.assert_allclose(found.lse, expected.lse, atol=0.25)
        same += int((found.argmax == expected.argmax).sum())
        tokens += len(found.argmax)
    assert same / tokens > 0.95
