"""Durable writes on a local file system.

A name appears with its whole content or not at all, and survives a power cut
once the call has returned.
"""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ..errors import StoreCorruptError, StoreError, StoreFullError

TEMPORARY_PREFIX = ".tmp-"
"""Starts the name of every file and directory that is not yet published."""

_READ_BYTES = 1 << 22
_MORE_ROOM = "free some space, or move the directory to a larger disk"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_directory(path: Path) -> None:
    """Make the names inside one directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Make every file below ``root`` durable, then every directory, ``root`` and its parent last."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))
    fsync_directory(root.parent)


def make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing, durably; nothing happens if it is there."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Return a fresh unpublished name beside ``path``."""
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")


def publish(path: Path, content: bytes) -> bool:
    """Write a file if none of that name exists, atomically; return whether this call wrote it."""
    make_directory(path.parent)
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


def file_hash(path: Path) -> str:
    """Return the XXH3 128-bit hash of a whole file, as hex.

    No crc32c: the chunks of a shard end in theirs, and the crc of what ends in its own crc does not
    depend on the content, so that all shards of a shape would have the same.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def content_hash(content: bytes) -> str:
    """Return what ``file_hash`` returns for a file with this content."""
    return xxhash.xxh3_128_hexdigest(content)


def require_inside(root: str | Path, key: str) -> None:
    """Raise StoreCorruptError if the path ``key`` below ``root`` would leave it."""
    steps = key.split("/")
    if not steps[0] or ".." in steps:
        raise StoreCorruptError(
            f"{root}: a record names the path {key!r}, expected one inside the store. "
            "Do not use this store; the record was not written by specx."
        )


def inside(root: Path, key: str) -> Path:
    """Return ``root / key``; raise StoreCorruptError if that would leave ``root``."""
    require_inside(root, key)
    return root / key


@contextmanager
def disk_errors(root: Path, how_to_mend: str = _MORE_ROOM) -> Iterator[None]:
    """Turn the operating system's refusals to write below ``root`` into one clear line.

    ``how_to_mend`` says how room is made where there is none.
    """
    try:
        yield
    except (PermissionError, NotADirectoryError) as error:
        raise StoreError(f"{root}: {error.strerror}: {error.filename}. Choose a place you can write to.") from error
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise StoreFullError(
            f"{root}: {os.strerror(error.errno).lower()} while writing. What was finished before is kept: "
            f"{how_to_mend}, and rerun the same command."
        ) from error
