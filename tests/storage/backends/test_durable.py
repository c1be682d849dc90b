"""Publishing, paths inside a root, and what the user is told of a disk that refuses."""

import errno
import os
from pathlib import Path

import pytest

from specx.storage.backends.durable import TEMPORARY_PREFIX, disk_errors, inside, publish, temporary_name
from specx.storage.errors import StoreCorruptError, StoreError, StoreFullError


def test_publish_keeps_the_first_content_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "name.json"
    assert publish(path, b"first")
    assert not publish(path, b"second")
    assert path.read_bytes() == b"first"


def test_publish_leaves_no_temporary_file_whether_it_wins_or_loses(tmp_path: Path) -> None:
    publish(tmp_path / "name", b"first")
    publish(tmp_path / "name", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_temporary_names_are_fresh_and_beside_the_name(tmp_path: Path) -> None:
    names = {temporary_name(tmp_path / "part") for _ in range(50)}
    assert len(names) == 50
    assert all(name.parent == tmp_path and name.name.startswith(TEMPORARY_PREFIX) for name in names)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "", "a/../../x", "a/..", "..", "a/../b"])
def test_a_path_that_may_leave_its_root_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreCorruptError, match="expected one inside the store"):
        inside(tmp_path, key)


def test_a_path_below_its_root_is_kept(tmp_path: Path) -> None:
    assert inside(tmp_path, "lse/c/0") == tmp_path / "lse" / "c" / "0"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_told_with_what_to_do(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(StoreFullError, match=r"What was finished before is kept: free some space.*rerun"),
        disk_errors(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


def test_a_read_only_store_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"lse/c/0\. Choose a place you can write to"), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "lse/c/0")


def test_other_errors_of_the_disk_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error") as caught, disk_errors(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.errno == errno.EIO
