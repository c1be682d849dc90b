"""A real server of vLLM over HTTP; one of SGLang, which does not run on a CPU, as its answers look."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from specx import SpecxError
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.pipeline import run as evaluate
from specx.train.evaluate.results_file import REQUESTS_FILE
from specx.train.evaluate.summary import EvaluateSummary

from ..conftest import MAX_NEW_TOKENS

START_S = 240


@pytest.fixture(scope="module", autouse=True)
def _without_proxy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory, target: Path, exported_draft: Path) -> Iterator[str]:
    """What `vllm serve` starts; that command itself asks for a package called vllm, which the CPU build is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    speculative = {"method": "eagle3", "model": str(exported_draft), "num_speculative_tokens": 3}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--speculative-config", json.dumps(speculative), "--per-request-spec-decode-metrics", "detailed"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=log.parent
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not is_up(url):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def settings(target: Path, regen: Path, questions: Path, exported_draft: Path) -> dict[str, Any]:
    return {
        "draft": str(exported_draft),
        "target": str(target),
        "data": (str(questions), str(regen / "dev.parquet")),
        "limit": 14,
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_sizes": (8,),
        "engine": "server",
    }


def decoded(settings: dict[str, Any], **changes: Any) -> EvaluateSummary:
    summary = evaluate(EvaluateConfig(**settings | changes))
    assert isinstance(summary, EvaluateSummary)
    return summary


def test_a_vllm_server_accepts_what_vllm_in_process_does(
    vllm_url: str, settings: dict[str, Any], summaries: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    summary = decoded(settings, url=f"{vllm_url}/v1", out=str(tmp_path / "out"))
    own = summaries["vllm"]
    assert summary.acceptance_length == pytest.approx(own["acceptance_length"], rel=0.02)
    assert summary.per_position == pytest.approx(own["per_position"], abs=0.02)
    assert summary.by_category == pytest.approx(own["by_category"], rel=0.1)
    assert summary.requests == 18
    assert (summary.lossless, summary.baseline_tokens_per_s) == (None, None)
    # The counters of the server's page are the sum of what it told of each request.
    rows = pq.read_table(tmp_path / "out" / REQUESTS_FILE).to_pylist()
    assert sum(row["verifications"] for row in rows) == summary.verifications


def test_a_server_that_drafts_is_no_baseline(vllm_url: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SpecxError, match="this server drafts; --baseline-url takes one that does not"):
        decoded(settings, url=vllm_url, baseline_url=vllm_url, limit=1, max_new_tokens=2)


def test_a_refused_request_says_why(vllm_url: str, settings: dict[str, Any], tmp_path: Path) -> None:
    # The server's own limit, which --target does not tell.
    other = tmp_path / "target"
    other.mkdir()
    for path in Path(settings["target"]).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text()) | {"max_position_embeddings": 9000}
    (other / "config.json").write_text(json.dumps(config))
    (tmp_path / "long.jsonl").write_text(json.dumps({"input_ids": [5] * 5000, "loss_mask": [0] * 5000}))
    with pytest.raises(SpecxError, match=f"{vllm_url}/v1/completions: HTTP 400: .*4096"):
        decoded(settings, url=vllm_url, target=str(other), data=(str(tmp_path / "long.jsonl"),))


Answers = dict[str, Callable[[Any], Any]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], str]]:
    """Serve answers by path; returns the address."""
    servers = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = answers.get(self.path)
                found = None if answer is None else answer(json.loads(body) if body else None)
                content = found.encode() if isinstance(found, str) else json.dumps(found).encode()
                self.send_response(404 if answer is None else 200)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815 - the library's name

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sglang(verifications: int | None) -> Answers:
    def generate(asked: Any) -> Any:
        assert asked["sampling_params"]["max_new_tokens"] == MAX_NEW_TOKENS
        assert all(isinstance(each, int) for each in asked["input_ids"])
        meta = {"completion_tokens": 7} | ({} if verifications is None else {"spec_verify_ct": verifications})
        return {"text": "", "output_ids": [3, 4, 5, 6, 7, 8, 9], "meta_info": meta}

    return {"/v1/models": lambda _: {"data": [{"id": "m", "owned_by": "sglang"}]}, "/generate": generate}


def test_an_sglang_server_tells_the_verifications_of_each_request(
    serve: Callable[[Answers], str], settings: dict[str, Any]
) -> None:
    summary = decoded(settings, url=serve(sglang(3)), baseline_url=serve(sglang(None)), limit=5)
    # Of 7 tokens one is the prefill's and 3 were not drafted.
    assert summary.acceptance_length == 2.0
    assert summary.per_position == []
    assert set(summary.by_category.values()) == {2.0}
    assert summary.lossless is True
    assert (summary.requests, summary.verifications) == (9, 27)


def test_an_sglang_server_without_a_draft_is_named(serve: Callable[[Answers], str], settings: dict[str, Any]) -> None:
    url = serve(sglang(None))
    with pytest.raises(SpecxError, match=f"{url}: this server does not draft; --url takes one that does"):
        decoded(settings, url=url, limit=1)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "/v1/models: HTTP 404"),
        ({"/v1/models": lambda _: "<html>"}, "/v1/models: the answer is not JSON"),
        (
            {"/v1/models": lambda _: {"data": [{"id": "m"}]}, "/metrics": lambda _: "python_info 1"},
            "this server does not draft; --url takes one that does",
        ),
    ],
    ids=["another server", "not JSON", "without a draft"],
)
def test_a_server_of_another_kind_is_named(
    serve: Callable[[Answers], str], settings: dict[str, Any], answers: Answers, message: str
) -> None:
    with pytest.raises(SpecxError, match=message):
        decoded(settings, url=serve(answers))


def test_a_server_that_does_not_run_is_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecxError, match=r"http://127\.0\.0\.1:9: no answer .* Start the server, or give --url"):
        decoded(settings, url="http://127.0.0.1:9")
