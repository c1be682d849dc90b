"""Speculative decoding in a running server, vLLM's or SGLang's, asked over HTTP with token ids.

vLLM (0.32) is asked at /v1/completions. What its drafts were accepted is the difference of the counters of /metrics
before and after a pass; a server with ``--per-request-spec-decode-metrics detailed`` tells it of each request too.
SGLang (0.5) has no such counters, only a gauge of the last moments; its own /generate tells the number of
verifications of each request.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

from ...errors import TrainError
from ..generations import Generation, Pass, Tally, tally_of, whole_pass
from .base import Conversation, DecodingEngine, DecodingTask

_TIMEOUT_S = 1800.0
"""Of one request: a long answer at a batch size that the server queues takes minutes."""
_SETTLING_S = 0.3
"""vLLM answers the last request a moment before it counts its last step."""

_COUNTER = re.compile(r"^vllm:spec_decode_(\w+)_total(?:\{(.*)\})? (\S+)$")
_POSITION = re.compile(r'position="(\d+)"')


class ServerEngine:
    """A server that somebody else has started, and that nobody else asks meanwhile."""

    def __init__(self, url: str, task: DecodingTask, *, is_drafted: bool) -> None:
        """Look what server it is; raise TrainError if it is none, or one that does not draft though it should."""
        self._url = url.rstrip("/").removesuffix("/v1")
        self._task = task
        self._is_drafted = is_drafted
        models = self._ask("/v1/models")["data"]
        self._model: str = models[0]["id"]
        self._kind: Literal["vllm", "sglang"] = "sglang" if models[0].get("owned_by") == "sglang" else "vllm"
        if self._kind == "vllm" and (self._counters() is not None) != is_drafted:
            found, wanted = ("drafts", "does not") if not is_drafted else ("does not draft", "does")
            option = "--url" if is_drafted else "--baseline-url"
            raise TrainError(f"{self._url}: this server {found}; {option} takes one that {wanted}. Start another.")

    def decode(self, batch_size: int) -> Pass:
        """Decode all prompts, ``batch_size`` conversations at a time."""
        before = self._settled()
        started = time.monotonic()
        with ThreadPoolExecutor(batch_size, thread_name_prefix="specx-request") as threads:
            played = threads.map(self._play, range(len(self._task.prompts)))
            generations = [generation for conversation in played for generation in conversation]
        done = whole_pass(generations, time.monotonic() - started)
        after = self._settled()
        if before is None or after is None:
            return done
        assert before.per_position is not None
        assert after.per_position is not None
        tally = Tally(
            verifications=after.verifications - before.verifications,
            accepted=after.accepted - before.accepted,
            per_position=[a - b for a, b in zip(after.per_position, before.per_position, strict=True)],
        )
        return Pass(generations=done.generations, seconds=done.seconds, tally=tally)

    def _play(self, number: int) -> list[Generation]:
        conversation = Conversation(self._task, number)
        generations: list[Generation] = []
        is_going_on = conversation.new_tokens > 0
        while is_going_on:
            started = time.monotonic()
            generate = self._generate_vllm if self._kind == "vllm" else self._generate_sglang
            output_ids, accepted, tally = generate(conversation)
            generations.append(
                Generation(
                    prompt=number,
                    turn=conversation.turn,
                    prompt_length=len(conversation.ids),
                    output_ids=output_ids,
                    accepted=accepted,
                    tally=tally,
                    seconds=time.monotonic() - started,
                )
            )
            is_going_on = conversation.advance(output_ids)
        return generations

    def _generate_vllm(self, conversation: Conversation) -> tuple[list[int], list[int] | None, Tally | None]:
        asked = {
            "model": self._model,
            "prompt": conversation.ids,
            "max_tokens": conversation.new_tokens,
            "temperature": self._task.temperature,
            # Else the server's defaults, which it has from the target's generation config.
            "top_p": 1.0,
            "top_k": -1,
            "stop_token_ids": sorted(self._task.stop_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        answer = self._ask("/v1/completions", asked)
        output_ids = answer["choices"][0].get("token_ids")
        if output_ids is None:
            raise TrainError(f"{self._url}/v1/completions: the answer has no token_ids. Use vLLM 0.32 or SGLang 0.5.")
        own = (answer.get("metrics") or {}).get("speculative_decoding") or {}
        accepted = own.get("per_step_accepted")
        return output_ids, accepted, None if accepted is None else tally_of(accepted)

    def _generate_sglang(self, conversation: Conversation) -> tuple[list[int], list[int] | None, Tally | None]:
        sampling = {
            "max_new_tokens": conversation.new_tokens,
            "temperature": self._task.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "stop_token_ids": sorted(self._task.stop_ids),
        }
        answer = self._ask("/generate", {"input_ids": conversation.ids, "sampling_params": sampling})
        output_ids: list[int] = answer["output_ids"]
        verifications = answer["meta_info"].get("spec_verify_ct")
        if not self._is_drafted:
            return output_ids, None, None
        if verifications is None:
            raise TrainError(f"{self._url}: this server does not draft; --url takes one that does. Start another.")
        # The first token is the prefill's, and every verification gives one that was not drafted.
        accepted = max(0, len(output_ids) - 1 - verifications)
        return output_ids, None, Tally(verifications=verifications, accepted=accepted, per_position=None)

    def _settled(self) -> Tally | None:
        """Return the counters once they stand still; None where there are none."""
        if self._kind == "sglang" or not self._is_drafted:
            return None
        counters = self._counters()
        while True:
            time.sleep(_SETTLING_S)
            again = self._counters()
            if again == counters:
                return counters
            counters = again

    def _counters(self) -> Tally | None:
        """Return vLLM's counters since its start, of all its engines; None if it does not draft."""
        sums: dict[str, int] = {}
        positions: dict[int, int] = {}
        for line in self._read("/metrics").splitlines():
            found = _COUNTER.match(line)
            if not found:
                continue
            name, labels, value = found.groups()
            position = _POSITION.search(labels or "")
            if name == "num_accepted_tokens_per_pos" and position:
                number = int(position[1])
                positions[number] = positions.get(number, 0) + int(float(value))
            else:
                sums[name] = sums.get(name, 0) + int(float(value))
        if "num_drafts" not in sums:
            return None
        return Tally(
            verifications=sums["num_drafts"],
            accepted=sums["num_accepted_tokens"],
            per_position=[positions[number] for number in sorted(positions)],
        )

    def _ask(self, path: str, body: Any = None) -> Any:
        try:
            return json.loads(self._read(path, body))
        except ValueError as error:
            raise TrainError(f"{self._url}{path}: the answer is not JSON: {error}. Is this vLLM or SGLang?") from error

    def _read(self, path: str, body: Any = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                content: bytes = response.read()
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:200]
            raise TrainError(f"{self._url}{path}: HTTP {error.code}: {reason or error.reason}") from error
        except (OSError, ValueError) as error:
            raise TrainError(
                f"{self._url}: no answer ({error}). Start the server, or give --url the address of one that runs."
            ) from error
        return content.decode()


@contextmanager
def open_engine(task: DecodingTask, url: str, *, is_drafted: bool) -> Iterator[DecodingEngine]:
    """Find a running server. Raises TrainError."""
    yield ServerEngine(url, task, is_drafted=is_drafted)
