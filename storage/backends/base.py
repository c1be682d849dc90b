"""Where the files of a store live: what a store asks of a local disk or of object storage.

A key is a path below the store, with ``/`` between its parts. A tree is a
directory, or the objects whose keys begin alike. ``name_of`` gives what users are
told: the full path or URL.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ..errors import StoreError
from .local import LocalPlace


class Place(Protocol):
    """Files by key. Methods raise StoreError where the disk or the network refuses."""

    is_remote: bool
    """Whether trees have to be fetched to be read."""

    def name_of(self, key: str) -> str:
        """Return the full path or URL of a key; of the place itself for the empty key."""
        ...

    def read(self, key: str) -> bytes:
        """Return the content of a file; raise FileNotFoundError if there is none."""
        ...

    def publish(self, key: str, content: bytes) -> bool:
        """Write a file if none of that key exists, atomically and durably; return whether this call wrote it."""
        ...

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of what is directly in a folder, empty where there is no such folder."""
        ...

    def stamps(self, folder: str) -> dict[str, str]:
        """Return for each file directly in a folder, by name, what changes if the file is replaced."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file; nothing happens if there is none."""
        ...

    def sizes(self, tree: str) -> dict[str, int]:
        """Return the size in bytes of each file of a tree, by its key relative to the tree."""
        ...

    def last_change(self, key: str) -> float:
        """Return when a file, or the newest file of a tree, was written, in seconds since 1970; 0 if none is there."""
        ...

    def remove_tree(self, key: str) -> None:
        """Remove a tree or a file, whoever put it there. Raises StoreError if it cannot be."""
        ...

    def begin_tree(self, tree: str) -> Path:
        """Return where on the local disk a new tree is to be written; the caller makes the directory."""
        ...

    def put_tree(self, tree: str) -> None:
        """Put a begun tree, now complete, durably in its place."""
        ...

    def release_tree(self, tree: str) -> None:
        """Give up the room that a tree, begun or read, takes on the local disk if its place is elsewhere."""
        ...

    def delete_tree(self, tree: str) -> None:
        """Remove a tree wherever it is, begun or put; what cannot be removed stays, unreferenced."""
        ...

    def new_tree(self, tree: str, *, last: str) -> AbstractContextManager[Path]:
        """Give an empty local directory to fill; leaving the block normally puts it in its place.

        Whoever finds the file ``last`` finds the tree whole. Several writers at a time must write the same.
        """
        ...

    def local_tree(self, tree: str, sizes: Mapping[str, int] | None = None) -> AbstractContextManager[Path]:
        """Give a local directory that holds a tree while the block runs; its path is the same each time.

        ``sizes`` is what the tree consists of, by default what is there. Raises StoreCorruptError if
        a file is missing or has another size where it has to be fetched.
        """
        ...

    def write_errors(self) -> AbstractContextManager[None]:
        """Turn the operating system's refusals to write into one clear line."""
        ...


def place_at(path: str | Path, cache_bytes: int | None = None) -> Place:
    """Return the place a user names by a path or an ``s3://`` URL; raise StoreError for another URL.

    ``cache_bytes`` bounds the local copies of what is elsewhere; None is what the disk spares.
    """
    name = str(path)
    if not name.startswith("s3://"):
        if "://" in name:
            raise StoreError(f"{name}: neither a path nor s3://BUCKET/PREFIX. Give one of these as --store.")
        return LocalPlace(Path(path).absolute())
    try:
        from .s3 import S3Place
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise StoreError(f"{name}: stores on S3 need obstore. Install it with `pip install specx[s3]`.") from error
    return S3Place(name, cache_bytes=cache_bytes)
