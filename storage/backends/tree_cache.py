"""Local copies of trees that are elsewhere, for as long as there is room.

A copy is made once however many threads ask for it. It is never taken away from
a reader that holds it; of the others, those not used for longest go first.
"""

import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SPARED = 0.1
"""Share of the disk that copies leave free while others could make room."""


@dataclass(kw_only=True, slots=True)
class _Copy:
    size: int
    """Bytes"""
    readers: int = 1
    is_whole: bool = False


class TreeCache:
    """Copies below one directory, at most ``limit_bytes`` of them beside those that are being read."""

    def __init__(self, root: Path, limit_bytes: int | None) -> None:
        """Without a limit there is only the disk's."""
        self._root = root
        self._limit_bytes = limit_bytes
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._changed = threading.Condition()

    @contextmanager
    def held(self, tree: str, size: int, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """Give the directory with the copy of a tree, which stays while the block runs.

        ``fetch`` makes the copy of ``size`` bytes if there is none.
        """
        path = self._root / tree
        with self._changed:
            self._changed.wait_for(lambda: tree not in self._copies or self._copies[tree].is_whole)
            copy = self._copies.get(tree)
            if copy is None:
                self._make_room(size)
                copy = self._copies[tree] = _Copy(size=size)
            else:
                copy.readers += 1
            self._copies.move_to_end(tree)
        try:
            if not copy.is_whole:
                self._fill(tree, path, fetch)
            yield path
        finally:
            with self._changed:
                copy.readers -= 1

    def drop(self, tree: str) -> None:
        """Remove the copy of a tree unless it is being read; nothing happens if there is none."""
        with self._changed:
            if tree in self._copies and not self._copies[tree].readers:
                self._remove(tree)

    def _fill(self, tree: str, path: Path, fetch: Callable[[Path], None]) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            fetch(path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            with self._changed:
                del self._copies[tree]
                self._changed.notify_all()
            raise
        with self._changed:
            self._copies[tree].is_whole = True
            self._changed.notify_all()

    def _make_room(self, size: int) -> None:
        for tree in [tree for tree, copy in self._copies.items() if not copy.readers]:
            if self._has_room(size):
                return
            self._remove(tree)

    def _remove(self, tree: str) -> None:
        shutil.rmtree(self._root / tree, ignore_errors=True)
        del self._copies[tree]

    def _has_room(self, size: int) -> bool:
        if self._limit_bytes is not None:
            held = sum(copy.size for copy in self._copies.values())
            return held + size <= self._limit_bytes
        disk = shutil.disk_usage(self._root)
        return disk.free - size >= _SPARED * disk.total
