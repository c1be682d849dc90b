"""What the tests share: the tiny target, and a store, a run and a draft made once from it."""

import os

# Set before anything imports the libraries: nothing may be fetched, nothing reported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
# Bound to cores, as is its default, vLLM leaves one to other programs and takes the rest: of two cores, two tests at
# once would share the first.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import random
import shutil
import socket
import subprocess
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from specx.startup import collect_rarely
from specx.tests.command import run_command

# As the command line does.
collect_rarely()

DATA = Path(__file__).parent / "data"

Specx = Callable[..., subprocess.CompletedProcess[str]]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take minutes: no process is then left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def target() -> Path:
    """Directory of the tiny trained gpt-oss."""
    return DATA / "tiny-gpt-oss"


@pytest.fixture(scope="session")
def regen() -> Path:
    """Directory of its regenerated answers."""
    return DATA / "regen"


@pytest.fixture(scope="session")
def specx() -> Specx:
    """Run the command line in a process of its own and return what it printed."""

    def run(*arguments: str | int | Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        return run_command([str(each) for each in arguments], timeout)

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Make a directory in the first test process that needs it; the others wait for it and share it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    # Tests that a test starts share what its process has made.
    shared = Path(os.environ.get("SPECX_TESTS_SHARED", shared))

    def make(name: str, build: Callable[[Path], object]) -> Path:
        path = shared / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                begun = path.with_suffix(".begun")
                shutil.rmtree(begun, ignore_errors=True)
                build(begun)
                begun.rename(path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_store(made_once: MadeOnce, target: Path, regen: Path) -> Path:
    """A store of the first 120 answers in three parts; copy it before changing it."""
    from specx.extract.config import ExtractConfig
    from specx.extract.pipeline import run

    data = (str(regen / "train.parquet"),)

    def build(store: Path) -> None:
        run(ExtractConfig(target=str(target), data=data, store=str(store), limit=120, tokens_per_part=10_000))

    return made_once("store/tiny", build)


@pytest.fixture
def store_copy(tmp_path: Path, tiny_store: Path) -> Path:
    """The store of ``tiny_store``, to be damaged at will."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


@pytest.fixture(scope="session")
def trained_run(made_once: MadeOnce, tiny_store: Path) -> Path:
    """A run of 60 steps on ``tiny_store``, in float32; copy it before changing it."""
    from specx.train.config import TrainConfig
    from specx.train.pipeline import run

    settings = {"max_steps": 60, "step_tokens": 2048, "draft_vocab_size": 1024, "lr": 3e-3}

    def build(out: Path) -> None:
        run(TrainConfig.model_validate({"store": str(tiny_store), "out": str(out)} | settings))

    return made_once("run/eagle3", build)


@pytest.fixture(scope="session")
def exported_draft(made_once: MadeOnce, trained_run: Path) -> Path:
    """The draft of ``trained_run`` as exported."""
    from specx.train.export.write import export

    return made_once("draft/eagle3", lambda out: export(trained_run, out))


class Faults:
    """A network in front of an S3 server that loses some of the requests to it.

    A lost request is answered with an error or not at all, and may have been carried out before that.
    """

    def __init__(self, server: Callable[..., Iterable[bytes]]) -> None:
        self._server = server
        self.stop()

    def stop(self) -> None:
        """Lose nothing from now on."""
        self.lost = 0
        self._share = 0.0
        self._random = random.Random(0)
        self._methods: tuple[str, ...] = ()
        self._answers: dict[str, str | None] = {}

    def lose(self, share: float, seed: int, methods: tuple[str, ...] = ("PUT", "POST")) -> None:
        """Lose a share of the requests from now on, picked by a seed; ``lost`` counts them."""
        self._share, self._random, self._methods = share, random.Random(seed), methods

    def lose_answer(self, fragment: str) -> None:
        """Carry out the next PUT whose path has ``fragment`` in it, and never answer."""
        self._answers[fragment] = None

    def answer(self, fragment: str, status: str) -> None:
        """Answer the next PUT whose path has ``fragment`` in it with an error, and do nothing."""
        self._answers[fragment] = status

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fragment = next((each for each in self._answers if method == "PUT" and each in path), None)
        status: str | None = "500 Internal Server Error"
        if fragment is not None:
            status = self._answers.pop(fragment)
            is_handled, is_answered = status is None, status is not None
        elif method in self._methods and self._random.random() < self._share:
            is_handled, is_answered = self._random.random() < 0.5, self._random.random() < 0.5
        else:
            return self._server(environ, start_response)
        self.lost += 1
        if is_handled:
            b"".join(self._server(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if not is_answered:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response(status or "500 Internal Server Error", [("Content-Length", "0")])
        return []


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[tuple[str, Faults]]:
    """An S3 server in a thread of this process, and the network in front of it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        timeout = 10

        def log(self, *_: Any) -> None:
            pass

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    # One request at a time: this server looks whether a name is taken and takes it in two steps.
    server = make_server("127.0.0.1", 0, faults, threaded=False, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", faults
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(_s3_server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket that this process, and those it starts, reach by their environment."""
    endpoint, faults = _s3_server
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "made-up"),
        ("AWS_SECRET_ACCESS_KEY", "made-up"),
        ("AWS_REGION", "us-east-1"),
        ("NO_PROXY", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    bucket = f"specx-{uuid.uuid4().hex}"
    _send("PUT", f"{endpoint}/{bucket}")
    yield f"s3://{bucket}"
    faults.stop()
    _send("POST", f"{endpoint}/moto-api/reset")


@pytest.fixture
def s3_faults(_s3_server: tuple[str, Faults], s3: str) -> Faults:
    """The network to the server of ``s3``; it loses nothing until told to."""
    return _s3_server[1]


def _send(method: str, url: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, method=method)):
        pass
