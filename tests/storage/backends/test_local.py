"""Files on a local disk: trees appear whole, and keys stay inside."""

from pathlib import Path

import pytest

from specx.storage.backends.base import place_at
from specx.storage.backends.local import LocalPlace
from specx.storage.errors import StoreCorruptError, StoreError


def fill(place: LocalPlace, content: bytes) -> None:
    with place.new_tree("target", last="config.json") as directory:
        (directory / "config.json").write_bytes(content)
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_bytes(content)


def test_a_new_tree_appears_whole(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "store")
    fill(place, b"first")
    assert place.sizes("target") == {"config.json": 5, "sub/file": 5}
    assert place.names("") == ["target"]


def test_a_new_tree_that_broke_off_leaves_nothing(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "store")

    def break_off() -> None:
        with place.new_tree("target", last="config.json") as directory:
            (directory / "config.json").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert place.names("") == []


def test_the_first_of_two_new_trees_stays(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    with place.new_tree("target", last="config.json") as directory:
        (directory / "config.json").write_bytes(b"late")
        fill(place, b"early")
    assert place.read("target/config.json") == b"early"
    assert place.names("") == ["target"]


def test_what_is_not_there_has_no_names_and_no_files(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "gone")
    assert place.names("") == place.names("parts") == []
    assert place.sizes("parts/one") == {}
    place.delete_tree("parts/one")
    with pytest.raises(FileNotFoundError):
        place.read("dataset.json")


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x"])
def test_a_key_that_leaves_the_store_is_refused(tmp_path: Path, key: str) -> None:
    place = LocalPlace(tmp_path)
    for call in (place.read, place.names, place.sizes, place.begin_tree, place.delete_tree, place.name_of):
        with pytest.raises(StoreCorruptError, match="expected one inside the store"):
            call(key)


def test_a_place_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_at("store").name_of("") == str(tmp_path / "store")
    assert place_at(Path("store")).name_of("parts/one") == str(tmp_path / "store" / "parts" / "one")


@pytest.mark.parametrize("url", ["gs://bucket/store", "https://host/store", "S3://bucket/store"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match=rf"^{url}: neither a path nor s3://BUCKET/PREFIX"):
        place_at(url)
