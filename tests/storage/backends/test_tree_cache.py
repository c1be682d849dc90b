"""Copies are made once, kept while they are read, and give way when there is no room."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from specx.storage.backends.tree_cache import TreeCache


def counted(fetched: list[str], name: str) -> Callable[[Path], None]:
    """Something that makes a copy of 10 bytes and notes it."""

    def fetch(path: Path) -> None:
        fetched.append(name)
        (path / "file").write_bytes(b"0123456789")

    return fetch


def trees(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_a_copy_is_made_once_and_found_again_in_the_same_place(tmp_path: Path) -> None:
    cache, fetched = TreeCache(tmp_path, 100), list[str]()
    with cache.held("a", 10, counted(fetched, "a")) as first:
        pass
    with cache.held("a", 10, counted(fetched, "a")) as second:
        assert (second / "file").read_bytes() == b"0123456789"
    assert first == second
    assert fetched == ["a"]


def test_the_copy_not_used_for_longest_gives_way(tmp_path: Path) -> None:
    cache, fetched = TreeCache(tmp_path, 30), list[str]()
    for name in "abcadaeb":
        with cache.held(name, 10, counted(fetched, name)):
            assert sum(file.stat().st_size for file in tmp_path.rglob("file")) <= 30
    assert trees(tmp_path) == {"a", "e", "b"}
    assert fetched == ["a", "b", "c", "d", "e", "b"]


def test_a_copy_that_is_being_read_stays_whatever_the_limit(tmp_path: Path) -> None:
    cache, fetched = TreeCache(tmp_path, 20), list[str]()
    with cache.held("a", 10, counted(fetched, "a")) as held:
        for name in "bcd":
            with cache.held(name, 10, counted(fetched, name)):
                assert (held / "file").exists()
        with cache.held("large", 50, counted(fetched, "large")):
            assert (held / "file").exists()
            assert trees(tmp_path) == {"a", "large"}
    with cache.held("b", 10, counted(fetched, "b")):
        assert trees(tmp_path) == {"b"}


def test_without_a_limit_copies_give_way_to_the_free_space_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetched = TreeCache(tmp_path, None), list[str]()

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(total=100, free=40 - 10 * len(trees(tmp_path)))

    monkeypatch.setattr("shutil.disk_usage", usage)
    for name in "abcd":
        with cache.held(name, 10, counted(fetched, name)):
            pass
    assert trees(tmp_path) == {"b", "c", "d"}


def test_a_copy_is_dropped_unless_it_is_being_read(tmp_path: Path) -> None:
    cache = TreeCache(tmp_path, 100)
    with cache.held("a", 10, counted([], "a")):
        cache.drop("a")
        assert trees(tmp_path) == {"a"}
    cache.drop("a")
    cache.drop("b")
    assert trees(tmp_path) == set()


def test_a_copy_that_failed_leaves_nothing_and_is_made_anew(tmp_path: Path) -> None:
    cache, fetched = TreeCache(tmp_path, 100), list[str]()

    def fail(path: Path) -> None:
        (path / "half").write_bytes(b"01234")
        raise ConnectionError

    with pytest.raises(ConnectionError), cache.held("a", 10, fail):
        pass
    assert trees(tmp_path) == set()
    with cache.held("a", 10, counted(fetched, "a")) as path:
        assert [file.name for file in path.iterdir()] == ["file"]


def test_threads_that_ask_for_one_tree_wait_for_one_copy(tmp_path: Path) -> None:
    cache, fetched, seen = TreeCache(tmp_path, 100), list[str](), list[bytes]()

    def fetch(path: Path) -> None:
        time.sleep(0.05)
        counted(fetched, "a")(path)

    def read() -> None:
        with cache.held("a", 10, fetch) as path:
            seen.append((path / "file").read_bytes())

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [b"0123456789"] * 6
    assert fetched == ["a"]


def test_threads_that_read_more_than_the_limit_each_find_what_they_hold(tmp_path: Path) -> None:
    cache, errors = TreeCache(tmp_path, 20), list[BaseException]()

    def read(first: int) -> None:
        try:
            for i in range(60):
                name = "abcdef"[(first + i) % 6]
                with cache.held(name, 10, counted([], name)) as path:
                    assert (path / "file").read_bytes() == b"0123456789"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
