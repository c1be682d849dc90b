"""A store's files on a local disk, or on a file system mounted like one."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from .durable import disk_errors, fsync_directory, fsync_tree, inside, make_directory, publish, temporary_name


class LocalPlace:
    """Implements ``Place`` below a directory; trees are written where they stay."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self._root = root

    def name_of(self, key: str) -> str:
        return str(self._path(key))

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def publish(self, key: str, content: bytes) -> bool:
        return publish(self._path(key), content)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(path.name for path in self._path(folder).iterdir())
        except FileNotFoundError:
            return []

    def stamps(self, folder: str) -> dict[str, str]:
        try:
            with os.scandir(self._path(folder)) as entries:
                found = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return {}
        return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in found}

    def remove(self, key: str) -> None:
        with self.write_errors():
            self._path(key).unlink(missing_ok=True)

    def sizes(self, tree: str) -> dict[str, int]:
        found: dict[str, int] = {}
        waiting = [(str(self._path(tree)), "")]
        while waiting:
            folder, prefix = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        key = f"{prefix}{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append((entry.path, f"{key}/"))
                        elif entry.is_file():
                            found[key] = entry.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                continue
        return found

    def last_change(self, key: str) -> float:
        path = self._path(key)
        return max((each.lstat().st_mtime for each in (path, *path.rglob("*")) if each.exists()), default=0.0)

    def remove_tree(self, key: str) -> None:
        path = self._path(key)
        with self.write_errors():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def begin_tree(self, tree: str) -> Path:
        path = self._path(tree)
        make_directory(path.parent)
        return path

    def put_tree(self, tree: str) -> None:
        fsync_tree(self._path(tree))

    def release_tree(self, tree: str) -> None:
        """Do nothing: the tree is in its place."""

    def delete_tree(self, tree: str) -> None:
        shutil.rmtree(self._path(tree), ignore_errors=True)

    @contextmanager
    def new_tree(self, tree: str, *, last: str) -> Iterator[Path]:
        path = self._path(tree)
        temporary = temporary_name(path)
        try:
            with self.write_errors():
                temporary.mkdir(parents=True)
                yield temporary
                assert (temporary / last).exists()
                fsync_tree(temporary)
                try:
                    temporary.rename(path)
                except OSError:
                    # Another writer of the same tree was first.
                    if not path.exists():
                        raise
                fsync_directory(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def local_tree(self, tree: str, sizes: Mapping[str, int] | None = None) -> AbstractContextManager[Path]:
        return nullcontext(self._path(tree))

    def write_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self._root)

    def _path(self, key: str) -> Path:
        return inside(self._root, key) if key else self._root
