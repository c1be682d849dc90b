"""The part of the vLLM engine that lives in vLLM's own processes.

vLLM's ``extract_hidden_states`` method keeps the hidden states of every token in a
cache paged like its KV cache. When a request has finished, ``FeatureConnector``
reads that request's pages, makes the logits with the target's own head, and hands
both to a sink that writes the store; only counts leave the process.

Written against vLLM 0.32.

Shapes: T tokens of a request, L boundaries, H hidden size.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from .... import SpecxError
from ....storage.catalog.sequence_id import sequence_id
from ....storage.schema import DatasetInfo, Origin, Reject
from ....storage.store import FeatureStore
from ....storage.writer import FeatureWriter
from ...data.samples import Sample
from ..outputs import Outputs, reduce_outputs
from ..sink import Sink

REQUEST_KEY = "specx"
"""Names our entry in a request's ``kv_transfer_params``."""

_CHUNK_TOKENS = 2048
"""Tokens whose hidden states are taken out of the cache at once."""

_LOGPROB_SLACK = 1.0
"""Nats by which vLLM's greedy token may miss our most probable one: bfloat16 logits differ by the batch they are in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRequest:
    """What the scheduler tells the workers of a request that is done."""

    request_id: str
    input_ids: list[int]
    sampled: int
    """The token that vLLM itself chose to follow them."""
    blocks: list[int]
    """Pages of the hidden-state cache."""
    params: dict[str, Any]
    """Mask and origin, as ``VllmExtractionEngine`` sent them."""


@dataclass
class FinishedRequests(KVConnectorMetadata):
    """One step's message from the scheduler to the workers."""

    requests: list[FinishedRequest] = field(default_factory=list)


class FeatureConnector(KVConnectorBase_V1, SupportsHMA):
    """Takes hidden states out of vLLM; one instance in the scheduler, one in each worker."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _follow_parent()
        groups = kv_cache_config.kv_cache_groups
        layers = [
            (number, name, spec.block_size)
            for number, group in enumerate(groups)
            for name, spec in _layer_specs(group)
            if isinstance(spec, HiddenStateCacheSpec)
        ]
        self._group = 0
        # Where all layers attend alike, as in Llama, there is one group, and the scheduler is not told what is in it.
        if len(groups) > 1 or role == KVConnectorRole.WORKER:
            if len(layers) != 1:
                raise SpecxError(
                    f"vLLM keeps {len(layers)} layers of hidden states, expected 1. Use --engine transformers."
                )
            ((self._group, self._layer, self._block_size),) = layers
        self._finished: list[FinishedRequest] = []
        self._cache: torch.Tensor | None = None
        self.extractor: Extractor | None = None
        """What finished requests are handed to; set in workers before the first request."""

    def get_finished_count(self) -> int:
        """Return how many workers tell that a request's pages can be freed: the one that writes."""
        return 1

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep a finished request's pages until the worker has read them."""
        params = (request.kv_transfer_params or {}).get(REQUEST_KEY)
        if params is None or not request.output_token_ids:
            return False, None
        self._finished.append(
            FinishedRequest(
                request_id=request.request_id,
                input_ids=list(request.prompt_token_ids),
                sampled=request.output_token_ids[0],
                blocks=list(block_ids[self._group]),
                params=params,
            )
        )
        return True, None

    def build_connector_meta(self, scheduler_output: Any) -> FinishedRequests:
        requests, self._finished = self._finished, []
        return FinishedRequests(requests)

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._cache = kv_caches[self._layer]  # (pages, L + 1, block, H)
        assert self._cache.shape[2] == self._block_size, "pages are laid out otherwise than their group says"

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    @torch.inference_mode()
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Read the pages of finished requests; they may be freed as soon as this returns.

        Every read is queued on the stream of the forward pass, ahead of whatever writes these pages next.
        """
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, FinishedRequests)
        for request in metadata.requests:
            assert self.extractor is not None, "requests run before the store is open"
            self.extractor.extract(request, self._states(request))
        return {request.request_id for request in metadata.requests} or None, None

    def _states(self, request: FinishedRequest) -> Iterator[torch.Tensor]:
        """Yield the hidden states of a request, some tokens (rows, L + 1, H) at a time."""
        assert self._cache is not None
        pages_a_chunk = max(1, _CHUNK_TOKENS // self._block_size)
        tokens = len(request.input_ids)
        pages = torch.tensor(request.blocks, device=self._cache.device)
        for first in range(0, -(-tokens // self._block_size), pages_a_chunk):
            states = self._cache[pages[first : first + pages_a_chunk]]  # (pages, L + 1, block, H)
            rows = states.transpose(1, 2).flatten(0, 1)  # (pages * block, L + 1, H)
            yield rows[: tokens - first * self._block_size]


class Extractor:
    """Makes finished requests' outputs on a worker's device and hands them to the sink.

    The head of a tensor-parallel target is spread over the workers: all of them call
    ``extract`` in the same order, and only the first gets logits and has a sink.
    """

    def __init__(self, model: Any, info: DatasetInfo, sink: Sink | None) -> None:
        self._norm = model.model.norm
        self._head = model.compute_logits
        self._info = info
        self._copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.sink = sink
        self.error: SpecxError | None = None

    def extract(self, request: FinishedRequest, states: Iterator[torch.Tensor]) -> None:
        """Queue the outputs of one request whose hidden states come as chunks (rows, L + 1, H)."""
        arriving = _Arriving(request, self._copies)
        for rows in states:
            outputs = reduce_outputs(
                rows[:, :-1],
                self._norm(rows[:, -1].contiguous()),
                self._head,
                info=self._info,
            )
            if outputs is not None and self.sink is not None:
                arriving.add(outputs)
        if self.sink is None or self.error is not None:
            return
        try:
            for reject in request.params["rejects"]:
                self.sink.reject(Reject(**reject))
            self.sink.put(arriving.sample(), arriving)
        except SpecxError as error:
            # Raised here it would be a traceback of vLLM's process. The engine asks for it.
            self.error = error


class _Arriving:
    """One request's outputs on their way to the CPU; on CUDA by copies that the forward pass does not wait for."""

    def __init__(self, request: FinishedRequest, copies: "torch.cuda.Stream | None") -> None:
        self._request = request
        self._copies = copies
        self._filled = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._finite: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event] = []

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def sample(self) -> Sample:
        params = self._request.params
        return Sample(
            input_ids=np.asarray(self._request.input_ids, np.int32),
            loss_mask=np.frombuffer(params["loss_mask"], np.uint8),
            origin=Origin(source=params["source"], row=params["row"], category=params["category"]),
        )

    def add(self, outputs: Outputs) -> None:
        """Begin to copy the next rows."""
        if self._copies is None:
            self._copy(outputs)
            return
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self._copy(outputs)
        for tensor in outputs.tensors().values():
            # Its memory must not be given out again before the copy has run.
            tensor.record_stream(self._copies)
        self._copied = [self._copies.record_event()]

    def _copy(self, outputs: Outputs) -> None:
        tensors = outputs.tensors()
        self._finite.append(tensors.pop("finite").to("cpu", non_blocking=True))
        rows = slice(self._filled, self._filled + len(outputs.lse))
        for name, tensor in tensors.items():
            if name not in self._tensors:
                shape = (len(self._request.input_ids), *tensor.shape[1:])
                # torch keeps pinned memory for the next request of the size.
                pinned = self._copies is not None
                self._tensors[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=pinned)
            self._tensors[name][rows].copy_(tensor, non_blocking=True)
        self._filled = rows.stop

    def wait(self) -> Outputs:
        """Return the outputs; raise SpecxError if they cannot be those of this request."""
        for event in self._copied:
            event.synchronize()
        request = self._request
        where = f"{request.params['source']}: row {request.params['row']}"
        again = "Nothing of it was stored; report this with the version of vLLM, or use --engine transformers."
        if self._filled != len(request.input_ids):
            raise SpecxError(f"{where}: vLLM kept {self._filled} hidden states of {len(request.input_ids)}. {again}")
        if sequence_id(np.asarray(request.input_ids, np.int32)) != request.params["id"]:
            raise SpecxError(f"{where}: vLLM ran other token ids than it was given. {again}")
        outputs = Outputs(**self._tensors, finite=torch.stack(self._finite).all(0))
        if outputs.finite.all() and not _chose(outputs, request.sampled):
            raise SpecxError(
                f"{where}: the hidden states give token {int(outputs.argmax[-1])} where vLLM chose {request.sampled}: "
                f"they are not those of the last token. {again}"
            )
        return outputs


def _chose(outputs: Outputs, token: int) -> bool:
    """Whether the logits made from the last hidden state can be those that vLLM chose ``token`` by."""
    logprob = outputs.topk_logprob[-1].float()
    return bool((logprob[outputs.topk_ids[-1] == token] >= logprob[0] - _LOGPROB_SLACK).any())


class FeatureWorker:
    """Methods that vLLM adds to its workers, for ``VllmExtractionEngine`` to call.

    Arguments and results are plain values.
    """

    model_runner: Any

    def specx_open(self, store: str, tokens_per_part: int, queue_bytes: int) -> str | None:
        """Begin to write to a store; return what hinders it."""
        model = self.model_runner.get_model()
        for name in ("model.norm", "compute_logits"):
            if not _has(model, name):
                return f"vLLM {vllm.__version__}: its {type(model).__name__} has no {name}, which the logits need."
        connector = get_kv_transfer_group()
        assert isinstance(connector, FeatureConnector)
        try:
            opened = FeatureStore.open(store)
            is_writer = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_last_rank
            sink = None
            if is_writer:
                writer = FeatureWriter(opened, tokens_per_part=tokens_per_part)
                sink = Sink(writer, queue_bytes=queue_bytes)
        except SpecxError as error:
            return str(error)
        connector.extractor = Extractor(model, opened.info, sink)
        return None

    def specx_take(self, finish: bool) -> dict[str, Any] | None:
        """Return what became of requests since the last call, from the worker that writes."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, FeatureConnector)
        assert connector.extractor is not None
        sink = connector.extractor.sink
        if sink is None:
            return None
        try:
            if finish:
                sink.finish()
            outcome = asdict(sink.take())
        except SpecxError as error:
            return {"error": str(error)}
        return outcome | {"rejects": [reject.model_dump() for reject in outcome["rejects"]]}

    def specx_close(self) -> None:
        """Drop what is not committed."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, FeatureConnector)
        if connector.extractor is not None and connector.extractor.sink is not None:
            connector.extractor.sink.close()


def _layer_specs(group: Any) -> Iterable[tuple[str, Any]]:
    """Return name and cache spec of every layer of a group of layers that share their pages' numbers."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.items())
    return [(name, spec) for name in group.layer_names]


def _follow_parent() -> None:
    """Leave ^C to the process that started this one, and end when that one has, however it did.

    A terminal's ^C reaches vLLM's processes too, and one that is killed does not end its children:
    they would hold their GPU's memory for good.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return  # vLLM runs in the user's own process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_after_parent, name="specx-parent", daemon=True).start()


def _has(model: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(model, part):
            return False
        model = getattr(model, part)
    return callable(model)
