"""Damage to a store on S3: found by its URL, and never read as a value."""

import json
import subprocess
from collections.abc import Callable

import obstore
import pytest

from specx.storage.errors import StoreCorruptError
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore

from ..objects import bucket

Fill = Callable[..., FeatureStore]


def a_key(store: FeatureStore, name: str) -> str:
    """The whole key of an object of the first part."""
    prefix = store.root.split("/", 3)[3]
    return f"{prefix}/{store.part_key(store.records[0])}/{name}"


@pytest.mark.parametrize("kept", [None, 0, -1], ids=["deleted", "emptied", "cut"])
@pytest.mark.parametrize("name", ["aux_hidden/c/0/0/0", "lse/zarr.json"])
def test_a_missing_or_truncated_object_is_refused_on_read_and_found_by_verify(
    s3: str, fill: Fill, name: str, kept: int | None
) -> None:
    store = fill(f"{s3}/store", 4, tokens_per_part=100)
    key = a_key(store, name)
    content = bytes(obstore.get(bucket(s3), key).bytes())
    if kept is None:
        obstore.delete(bucket(s3), key)
    else:
        obstore.put(bucket(s3), key, content[:kept])
    found = "missing" if kept is None else f"{len(content[:kept])} bytes"
    message = (
        f"{s3}/{key}: {found}, the commit record says {len(content)} bytes. Delete {s3}/store/commits/u000000.json"
    )
    reader = FeatureReader(FeatureStore.open(f"{s3}/store"))
    with pytest.raises(StoreCorruptError) as caught:
        reader.features(0)
    assert str(caught.value).startswith(message)
    (problem,) = verify(FeatureStore.open(f"{s3}/store")).problems
    assert problem.startswith(message)


@pytest.mark.parametrize("name", ["aux_hidden/c/0/0/0", "lse/zarr.json"])
def test_a_changed_byte_is_never_read_as_a_value_and_is_told_by_its_url(s3: str, fill: Fill, name: str) -> None:
    store = fill(f"{s3}/store", 2, tokens_per_part=10_000)
    key = a_key(store, name)
    content = bytearray(obstore.get(bucket(s3), key).bytes())
    content[10] ^= 1
    obstore.put(bucket(s3), key, bytes(content))
    with pytest.raises(StoreCorruptError, match=f"^{s3}/{key}: "):
        FeatureReader(FeatureStore.open(f"{s3}/store")).features(0)
    (problem,) = verify(FeatureStore.open(f"{s3}/store")).problems
    assert problem.startswith(f"{s3}/{key}: ")


def test_an_object_that_vanishes_while_it_is_fetched_is_one_line(s3: str, fill: Fill) -> None:
    store = fill(f"{s3}/store", 1, tokens_per_part=50)
    sizes = store.place.sizes(store.part_key(store.records[0])) | {"lse/c/9": 100}
    tree = store.part_key(store.records[0])
    with pytest.raises(StoreCorruptError, match=r"lse/c/9: missing"), store.place.local_tree(tree, sizes):
        pass


@pytest.mark.parametrize("part", ["../outside.zarr", "/outside.zarr"])
def test_a_part_outside_the_store_is_refused(s3: str, fill: Fill, part: str) -> None:
    store = fill(f"{s3}/store", 1, tokens_per_part=50)
    forged = store.records[0].model_copy(update={"part": part}).sealed()
    obstore.put(bucket(s3), "store/commits/u000000.json", forged.to_bytes())
    with pytest.raises(StoreCorruptError, match="expected one inside the store"):
        FeatureReader(FeatureStore.open(f"{s3}/store")).features(0)


def test_the_command_line_shows_and_verifies_it(
    s3: str, fill: Fill, specx: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    store = fill(f"{s3}/store", 3, tokens_per_part=100)
    shown = specx("store", "info", f"{s3}/store", "--json")
    assert json.loads(shown.stdout.splitlines()[-1])["sequences"] == 3, shown.stderr
    assert specx("store", "verify", f"{s3}/store").returncode == 0
    obstore.delete(bucket(s3), a_key(store, "lse/c/0"))
    damaged = specx("store", "verify", f"{s3}/store")
    assert damaged.returncode == 1
    assert f"specx: {s3}/store: 1 damaged: {s3}/{a_key(store, 'lse/c/0')}: missing" in damaged.stderr
