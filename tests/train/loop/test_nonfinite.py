"""Values that are not finite: named, never trained on, and nothing lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from specx.storage.reader import FeatureReader
from specx.storage.schema import Origin
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter
from specx.train.config import TrainConfig
from specx.train.data.corpus import Corpus
from specx.train.data.datamodule import FeatureData
from specx.train.errors import TrainError
from specx.train.loop.checkpoint import load_checkpoint
from specx.train.pipeline import run

NAN, INFINITY = 0x7FC0, 0x7F80


def settings(store: Path, out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": str(store),
        "out": str(out),
        "max_steps": 12,
        "step_tokens": 512,
        "draft_vocab_size": 256,
        "ttt_steps": 2,
        "holdout_fraction": 0.0,
        "checkpoint_every": 1000,
        "log_every": 1,
    }
    return TrainConfig.model_validate(base | changes)


def spoiled(source: Path, path: Path, sequence: int, array: str, token: int, bits: int) -> Path:
    """Copy a store with one value of one sequence replaced; every checksum is right."""
    opened = FeatureStore.open(source)
    reader = FeatureReader(opened)
    store = FeatureStore.create(path, opened.info)
    with store.new_target() as target:
        for file in opened.target_directory.iterdir():
            if file.name != "hashes.json":
                (target / file.name).write_bytes(file.read_bytes())
    with FeatureWriter(store, tokens_per_part=10_000) as writer:
        for number in range(60):
            features = reader.features(number)
            if number == sequence:
                values = getattr(features, array)
                values.reshape(len(values), -1)[token, 5] = bits
            writer.add(features, Origin(source="made up", row=number))
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """The store that others are spoiled copies of."""
    return spoiled(tiny_store, tmp_path_factory.mktemp("sound") / "store", -1, "aux_hidden", 0, 0)


def a_sequence_of(store: Path, config: TrainConfig, step: int) -> int:
    """Return a sequence that a run trains on in a step, the first of its last batch."""
    corpus = Corpus([FeatureReader(FeatureStore.open(store))], (1, 3, 5))
    return FeatureData(config, corpus).step_plans(step)[-1].sequences[0]


@pytest.mark.parametrize(
    ("array", "bits", "shown"),
    [("aux_hidden", NAN, "aux_hidden of boundary 1 is nan"), ("last_hidden", INFINITY, "last_hidden is inf")],
)
def test_a_stored_value_that_is_not_finite_is_named_and_the_step_is_not_taken(
    tmp_path: Path, sound: Path, loss_curve: Callable[..., dict[int, float]], array: str, bits: int, shown: str
) -> None:
    sequence = a_sequence_of(sound, settings(sound, tmp_path), 6)
    token = int(FeatureReader(FeatureStore.open(sound)).catalogue.length[sequence]) - 6
    store = spoiled(sound, tmp_path / "store", sequence, array, token, bits)
    config = settings(store, tmp_path / "run")
    messages = []
    for _ in range(2):
        with pytest.raises(TrainError) as caught:
            run(config)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    name = bytes(FeatureStore.open(store).catalogue().ids[sequence]).hex()
    assert f"{shown} at token {token} of sequence {name}. Step 6 was not taken" in messages[0]
    assert messages[0].startswith(f"{store}/parts/u00000")
    assert "\n" not in messages[0]
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 5
    assert all(bool(weight.isfinite().all()) for weight in saved["state_dict"].values() if weight.is_floating_point())
    # Until then it is the run that it would have been.
    run(settings(sound, tmp_path / "sound"))
    expected, found = loss_curve(tmp_path / "sound"), loss_curve(tmp_path / "run")
    assert sorted(found) == list(range(1, 6))
    assert max(abs(found[each] - expected[each]) for each in found) <= 1e-5


def test_a_run_goes_on_where_it_stopped_once_the_value_is_sound(
    tmp_path: Path, sound: Path, loss_curve: Callable[..., dict[int, float]]
) -> None:
    """As after a new extraction of that part: nothing is lost, and the curve is the undisturbed one."""
    sequence = a_sequence_of(sound, settings(sound, tmp_path, step_tokens=1024, batch_tokens=600), 4)
    store = spoiled(sound, tmp_path / "store", sequence, "aux_hidden", 3, NAN)
    out = tmp_path / "run"
    with pytest.raises(TrainError, match=r"aux_hidden of boundary 1 is nan at token 3 of .* Step 4 was not taken"):
        run(settings(store, out, step_tokens=1024, batch_tokens=600))
    assert load_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert run(settings(sound, out, step_tokens=1024, batch_tokens=600)).steps == 12
    run(settings(sound, tmp_path / "sound", step_tokens=1024, batch_tokens=600))
    expected, found = loss_curve(tmp_path / "sound"), loss_curve(out)
    assert sorted(found) == sorted(expected)
    assert max(abs(found[each] - expected[each]) for each in found) <= 1e-5


def test_a_run_that_diverges_says_so(tmp_path: Path, tiny_store: Path) -> None:
    with pytest.raises(TrainError) as caught:
        run(settings(tiny_store, tmp_path / "run", lr=1e30, gradient_clip=1e30, max_steps=30))
    message = str(caught.value)
    assert "though all its features are finite: the run diverges" in message
    assert "lower --lr" in message
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert f"at step {saved['global_step'] + 1}, at a learning rate of" in message
    assert f"stands at the checkpoint of step {saved['global_step']}" in message


def test_a_held_out_value_that_is_not_finite_is_named_again_and_again(tmp_path: Path, sound: Path) -> None:
    config = settings(sound, tmp_path, holdout_fraction=0.3, validate_every=3)
    corpus = Corpus([FeatureReader(FeatureStore.open(sound))], (1, 3, 5))
    sequence = FeatureData(config, corpus).holdout_plans[0].sequences[0]
    token = int(corpus.length[sequence]) - 8
    store = spoiled(sound, tmp_path / "store", sequence, "last_hidden", token, NAN)
    config = settings(store, tmp_path / "run", holdout_fraction=0.3, validate_every=3, checkpoint_every=2)
    for _ in range(2):
        with pytest.raises(TrainError, match=rf"last_hidden is nan at token {token} .* met behind step 3\."):
            run(config)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2
