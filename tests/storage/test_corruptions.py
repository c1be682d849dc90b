"""Whatever is changed in a store is found, and never read as if it were right.

60 corruptions, or as many as SPECX_CORRUPTIONS says: `make torture` has 300.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from specx.storage.catalog.rejects import RejectLog, read_rejects
from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.catalog.views import ViewWriter, load_views
from specx.storage.errors import StoreError
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, Origin, Reject, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

Damage = Callable[[Path, random.Random], str]

SEQUENCES = 12
"""The first half of them all of one length, so that shards of one part fit into another."""


def length(i: int) -> int:
    return 300 if i < SEQUENCES // 2 else 40 + 20 * i


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: pytest.TempPathFactory,
    info: DatasetInfo,
    make_features: Callable[[int, int], SequenceFeatures],
) -> Path:
    """A store with all that a store may have: a target, views, rejects and an index; not compressed."""
    path = tmp_path_factory.mktemp("sound") / "store"
    store = FeatureStore.create(path, info.model_copy(update={"codec": "none"}))
    with store.new_target() as directory:
        (directory / "config.json").write_text('{"hidden_size": 16}')
        (directory / "head.safetensors").write_bytes(random.Random(0).randbytes(500))
    with (
        FeatureWriter(store, tokens_per_part=300) as writer,
        ViewWriter(store.place, "all") as view,
        RejectLog(store.place) as rejects,
    ):
        for i in range(SEQUENCES):
            features = make_features(length(i), i)
            origin = Origin(source="made-up", row=i)
            writer.add(features, origin)
            view.add(sequence_id(features.input_ids), features.loss_mask, origin)
            rejects.add(Reject(source="made-up", row=i, reason="empty", detail=""))
    store.records.save_index(unindexed=1)
    return path


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def flip(root: Path, generator: random.Random) -> str:
    """Flip a bit of any file, or of any of any array: arrays of few bytes are hit as often as large ones."""
    folders = sorted({path.parent for path in files(root)})
    path = generator.choice([each for each in sorted(generator.choice(folders).iterdir()) if each.is_file()])
    content = bytearray(path.read_bytes())
    position = generator.randrange(len(content))
    content[position] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return f"bit flipped at {position} of {path.relative_to(root)}"


def cut(root: Path, generator: random.Random) -> str:
    path = generator.choice(files(root))
    content = path.read_bytes()
    kept = generator.randrange(len(content))
    path.write_bytes(content[:kept])
    return f"{path.relative_to(root)} cut to {kept} bytes"


def lengthen(root: Path, generator: random.Random) -> str:
    path = generator.choice(files(root))
    with path.open("ab") as file:
        file.write(generator.randbytes(generator.randint(1, 50)))
    return f"bytes added to {path.relative_to(root)}"


def delete(root: Path, generator: random.Random) -> str:
    """Delete a file that is named by another: of a commit, a view or a cache nothing else knows."""
    path = generator.choice([each for each in files(root) if each.relative_to(root).parts[0] in ("parts", "target")])
    path.unlink()
    return f"{path.relative_to(root)} deleted"


def swap(root: Path, generator: random.Random) -> str:
    """Exchange two files of one size and one name, or two whole parts."""
    parts = sorted((root / "parts").iterdir())
    if generator.random() < 0.3:
        one, other = generator.sample(parts, 2)
    else:
        sizes: dict[tuple[str, int], list[Path]] = {}
        for path in files(root / "parts"):
            key = (path.relative_to(root / "parts").as_posix().partition("/")[2], path.stat().st_size)
            sizes.setdefault(key, []).append(path)
        alike = [each for each in sizes.values() if len({path.read_bytes() for path in each}) > 1]
        group = generator.choice(alike)
        one = generator.choice(group)
        other = generator.choice([path for path in group if path.read_bytes() != one.read_bytes()])
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.relative_to(root)} and {other.relative_to(root)} exchanged"


def exchange_records(root: Path, generator: random.Random) -> str:
    one, other = generator.sample(sorted((root / "commits").iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{one.name} and {other.name} exchanged"


DAMAGES: list[Damage] = [flip, flip, flip, cut, lengthen, delete, swap, exchange_records]


def is_found_by_verify(root: Path) -> bool:
    try:
        return bool(verify(FeatureStore.open(root, tolerant=True)).problems)
    except StoreError:
        return True


def read_all(
    root: Path,
    make_features: Callable[[int, int], SequenceFeatures],
    assert_same: Callable[[SequenceFeatures, SequenceFeatures], None],
) -> bool:
    """Read everything; return whether damage was met. What is read must be right."""
    is_met = False
    try:
        store = FeatureStore.open(root, tolerant=True)
        reader = FeatureReader(store)
    except StoreError:
        return True
    expected = {sequence_id(make_features(length(i), i).input_ids): i for i in range(SEQUENCES)}
    for number in range(len(reader.catalogue)):
        i = expected[bytes(reader.catalogue.ids[number])]
        try:
            assert_same(reader.features(number), make_features(length(i), i))
        except StoreError:
            is_met = True
    for read in (
        lambda: load_views(store.place, ["all"]),
        lambda: read_rejects(store.place),
        lambda: store.target_directory,
    ):
        try:
            read()
        except StoreError:
            is_met = True
    return is_met or bool(store.records.damaged)


def test_every_corruption_is_found_and_none_is_read(
    tmp_path: Path,
    sound: Path,
    make_features: Callable[[int, int], SequenceFeatures],
    assert_same: Callable[[SequenceFeatures, SequenceFeatures], None],
) -> None:
    generator = random.Random(0)
    wanted = int(os.environ.get("SPECX_CORRUPTIONS", "60"))
    assert not is_found_by_verify(sound)
    assert not read_all(sound, make_features, assert_same)
    kinds: Counter[str] = Counter()
    met = 0
    missed = []
    for number in range(wanted):
        root = Path(shutil.copytree(sound, tmp_path / "store"))
        damage = DAMAGES[number % len(DAMAGES)]
        what = damage(root, generator)
        kinds[damage.__name__] += 1
        if not is_found_by_verify(root):
            missed.append(what)
        met += read_all(root, make_features, assert_same)
        shutil.rmtree(root)
    print(f"{wanted} corruptions, {wanted - len(missed)} found by verify, {met} met on reading: {dict(kinds)}")
    assert missed == []
