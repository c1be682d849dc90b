"""A store's files on S3, or on what speaks its protocol.

Every request is repeated a few times before it counts as failed, and may have
been carried out although it failed. So nothing here depends on a request
happening once: parts have names of their own, and a record is known by its bytes.

Credentials, region and endpoint are those of the usual ``AWS_*`` variables.
Objects of this file must not be used in a process forked after they were.
"""

import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from ..errors import StoreCorruptError, StoreError
from .durable import disk_errors, require_inside
from .retry import Retry
from .tree_cache import TreeCache

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_THREADS = 8
_READ_BYTES = 16 << 20
"""Of one request that reads a part."""
_WRITE_BYTES = 8 << 20
"""Of one request that writes a part; larger objects are sent in pieces."""
_WRITES_PER_OBJECT = 2

_log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

_process: int | None = None
"""The process that asked first."""


class S3Place:
    """Implements ``Place`` below a prefix of a bucket.

    Trees are written to, and read from, a temporary directory of this object, which goes with it.
    """

    is_remote = True

    def __init__(self, url: str, *, retry: Retry | None = None, cache_bytes: int | None = None) -> None:
        """``cache_bytes`` bounds the copies of parts on the local disk; by default only the disk does."""
        self._url = url.rstrip("/")
        bucket, _, prefix = self._url.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise StoreError(f"{url}: {bucket!r} is not the name of a bucket. Give s3://BUCKET/PREFIX.")
        if prefix:
            require_inside(self._url, prefix)
        self._bucket = bucket
        self._retry = retry or Retry()
        self._objects = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": _endpoint().startswith("http://"),
                "connect_timeout": "5s",
                "read_timeout": "60s",
                "timeout": "180s",
            },
            # Repeated here instead, where it is known what a request may have done already.
            retry_config={"max_retries": 0, "retry_timeout": timedelta(minutes=3)},
        )
        self._local = Path(tempfile.mkdtemp(prefix="specx-"))
        weakref.finalize(self, shutil.rmtree, self._local, ignore_errors=True)
        self._cache = TreeCache(self._local / "read", cache_bytes)
        (self._local / "read").mkdir()
        self._put: set[str] = set()

    def name_of(self, key: str) -> str:
        if not key:
            return self._url
        require_inside(self._url, key)
        return f"{self._url}/{key}"

    def read(self, key: str) -> bytes:
        return bytes(self._ask("reading", key, lambda: obstore.get(self._objects, key).bytes()))

    def publish(self, key: str, content: bytes) -> bool:
        """As ``Place.publish``; of equal contents of one key, each counts as written by its caller."""

        def put() -> bool:
            try:
                obstore.put(self._objects, key, content, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                # Perhaps by this very call: the answer to an earlier try may have been lost.
                try:
                    return bytes(obstore.get(self._objects, key).bytes()) == content
                except FileNotFoundError:
                    # S3 answers so while it decides between two writers, and wants to be asked again.
                    raise BaseError(str(error)) from error
            return True

        return self._ask("writing", key, put)

    def names(self, folder: str) -> list[str]:
        found = self._ask("listing", folder, lambda: obstore.list_with_delimiter(self._objects, folder or None))
        keys = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        return sorted(key.rpartition("/")[2] for key in keys)

    def stamps(self, folder: str) -> dict[str, str]:
        found = self._ask("listing", folder, lambda: obstore.list_with_delimiter(self._objects, folder or None))
        return {each["path"].rpartition("/")[2]: f"{each['size']}-{each['e_tag']}" for each in found["objects"]}

    def remove(self, key: str) -> None:
        self._ask("deleting", key, lambda: obstore.delete(self._objects, key))

    def sizes(self, tree: str) -> dict[str, int]:
        found = self._ask("listing", tree, lambda: obstore.list(self._objects, tree).collect())
        return {each["path"].removeprefix(f"{tree}/"): each["size"] for each in found}

    def last_change(self, key: str) -> float:
        found = self._ask("listing", key, lambda: obstore.list(self._objects, key).collect())
        return max((each["last_modified"].timestamp() for each in found), default=0.0)

    def remove_tree(self, key: str) -> None:
        keys = [f"{key}/{name}" for name in self.sizes(key)]
        self._ask("deleting", key, lambda: obstore.delete(self._objects, keys or key))

    def begin_tree(self, tree: str) -> Path:
        path = self._begun(tree)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def put_tree(self, tree: str) -> None:
        self._upload(tree, self._begun(tree))

    def release_tree(self, tree: str) -> None:
        shutil.rmtree(self._begun(tree), ignore_errors=True)
        self._cache.drop(tree)
        self._put.discard(tree)

    def delete_tree(self, tree: str) -> None:
        shutil.rmtree(self._begun(tree), ignore_errors=True)
        if tree not in self._put:
            return
        try:
            keys = [f"{tree}/{key}" for key in self.sizes(tree)]
            self._ask("deleting", tree, lambda: obstore.delete(self._objects, keys))
            self._put.discard(tree)
        except StoreError as error:
            _log.warning("%s: left behind, as no commit names it: %s", self.name_of(tree), error)

    @contextmanager
    def new_tree(self, tree: str, *, last: str) -> Iterator[Path]:
        path = self.begin_tree(tree)
        try:
            with self.write_errors():
                path.mkdir()
                yield path
                self._upload(tree, path, last)
        finally:
            self.release_tree(tree)

    @contextmanager
    def local_tree(self, tree: str, sizes: Mapping[str, int] | None = None) -> Iterator[Path]:
        found = self.sizes(tree) if sizes is None else sizes
        if not found:
            raise StoreCorruptError(f"{self.name_of(tree)}: missing. Rerun `specx extract`.")

        def fetch(path: Path) -> None:
            with self.write_errors():
                self._download(tree, found, path)

        with self._cache.held(tree, sum(found.values()), fetch) as path:
            yield path

    def write_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self._local, "free some space there, or set TMPDIR to a larger disk")

    def _begun(self, tree: str) -> Path:
        self.name_of(tree)
        return self._local / "written" / tree

    def _ask(self, doing: str, key: str, request: Callable[[], ItemT]) -> ItemT:
        _require_own_process()
        return self._retry.ask(f"{self.name_of(key)}: {doing}", f"s3://{self._bucket}", request)

    def _upload(self, tree: str, path: Path, last: str | None = None) -> None:
        self._put.add(tree)

        def put(file: Path) -> None:
            key = f"{tree}/{file.relative_to(path).as_posix()}"
            self._ask(
                "writing",
                key,
                lambda: obstore.put(
                    self._objects, key, file, chunk_size=_WRITE_BYTES, max_concurrency=_WRITES_PER_OBJECT
                ),
            )

        final = path / last if last else None
        _at_once(put, [file for file in sorted(path.rglob("*")) if file.is_file() and file != final])
        if final:
            put(final)

    def _download(self, tree: str, sizes: Mapping[str, int], path: Path) -> None:
        for key, size in sizes.items():
            require_inside(self.name_of(tree), key)
            (path / key).parent.mkdir(parents=True, exist_ok=True)
            with (path / key).open("xb") as file:
                file.truncate(size)

        def get(piece: tuple[str, int, int]) -> None:
            key, start, stop = piece
            name = f"{tree}/{key}"
            try:
                content = self._ask(
                    "reading", name, lambda: obstore.get_range(self._objects, name, start=start, end=stop)
                )
            except FileNotFoundError as error:
                raise StoreCorruptError(f"{self.name_of(name)}: missing. {_VERIFY}") from error
            if len(content) != stop - start:
                raise StoreCorruptError(
                    f"{self.name_of(name)}: {start + len(content)} bytes, expected {sizes[key]}. {_VERIFY}"
                )
            with (path / key).open("r+b") as file:
                file.seek(start)
                file.write(content)

        pieces = [
            (key, at, min(at + _READ_BYTES, sizes[key])) for key in sizes for at in range(0, sizes[key], _READ_BYTES)
        ]
        _at_once(get, pieces)


_VERIFY = "Run `specx store verify` to see all damage."


def _require_own_process() -> None:
    """Raise StoreError in a process forked after obstore was used: without its threads it would wait for ever."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise StoreError("S3 was used before this process was forked from another. Start processes by spawn instead.")


def _endpoint() -> str:
    # Those that obstore reads, in its order.
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if name in os.environ), "")


def _at_once(call: Callable[[ItemT], None], items: Iterable[ItemT]) -> None:
    """Call for each item, several at once; the first error stops what has not begun."""
    pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="specx-s3")
    try:
        for _ in pool.map(call, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
