"""``specx train --dry-run``: what a run will take of memory and time, before it starts.

Memory is counted from shapes; time is the matrix products of a step at the speed that
the device reaches on one of them, measured now.

"""

import logging
import math
import time
from dataclasses import dataclass

import torch

from ..storage.store import FeatureStore
from .config import TrainConfig
from .data.batch import read_batch
from .data.corpus import Corpus, require_alike
from .data.datamodule import FeatureData
from .data.packing import BatchPlan, Group
from .data.prefetch import BATCHES_IN_MEMORY
from .families.registry import family
from .families.spec import DraftSpec
from .loss.anchors import supervised_anchors
from .opening import new_spec, open_corpus, require_devices, store_records

_log = logging.getLogger(__name__)

_MEASURED_S = 0.3
_PARTS_LOOKED_AT = 8
_OVERHEAD = {"cpu": 1.9, "cuda": 2.5}
"""Step time over that of its matrix products alone: norms, softmax, rotary angles, optimizer, logs. Measured on a CPU
(docs/training.md); for CUDA a guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What ``--dry-run`` prints; bytes and seconds are those of one process."""

    device: str
    precision: str
    parameters: int
    """Trained"""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    frozen_bytes: int
    """The target's embedding and its head over the draft vocabulary"""
    activation_bytes: int
    """Kept from the forward pass of the largest batch for its backward pass"""
    batch_bytes: int
    """Of the largest batch as it is read"""
    host_batch_bytes: int
    """Of those that are in memory at a time, read ahead"""
    peak_bytes: int
    """All of it, without what Python and its libraries take: on the device, and on a CPU the host's batches too"""
    sequences: int
    """Trained on in an epoch"""
    steps: int
    step_tokens: int
    """On all devices together, at most"""
    batches_per_step: int
    """Into which a step is split, on all devices together"""
    tokens: int
    """Of the whole run, all processes together"""
    flops_per_step: float
    """Of one process"""
    step_s: float
    total_s: float
    """Without validations"""
    checkpoint_bytes: int
    """Of ``last.ckpt``; ``best.ckpt`` is a third of it"""
    fetched_bytes: int
    """Held on the local disk at a time, of stores that are elsewhere"""


def forecast(config: TrainConfig) -> Forecast:
    """Return what a run will take; nothing is written. Raises SpecxError as the run would."""
    stores = [FeatureStore.open(store, cache_bytes=config.cache_bytes) for store in config.store]
    require_devices(config)
    chosen = family(config.method)
    spec = new_spec(config, stores[0])
    require_alike(stores, spec.boundaries)
    corpus = open_corpus(stores, store_records(config, stores), spec.boundaries)
    data = FeatureData(config, corpus, config.devices)
    if line := data.oversized():
        _log.warning("%s", line)
    is_cuda = torch.cuda.is_available()
    precision = config.precision if config.precision != "auto" else ("bf16-mixed" if is_cuda else "32-true")
    device, dtype = ("cuda" if is_cuda else "cpu"), (torch.float32 if precision == "32-true" else torch.bfloat16)

    parameters = sum(math.prod(shape) for shape in chosen.weight_shapes(spec).values())
    shards = config.devices if config.strategy == "fsdp" else 1
    room, share = _tokens(_largest(data).sequences, data), _supervised_share(data)
    batch = _batch_bytes(room, corpus)
    activations = int(chosen.cost(spec, config.draft, room, share).activation_numbers * dtype.itemsize)
    frozen = (spec.vocab_size * 4 + spec.draft_vocab_size * dtype.itemsize) * spec.hidden_size
    weights = 4 * parameters // shards
    host = BATCHES_IN_MEMORY * batch
    tokens = sum(_tokens(step, data) for step in data.plan)
    flops = 3 * chosen.cost(spec, config.draft, tokens / data.steps, share).forward_flops / config.devices
    step_s = flops / _flops_per_s(spec, room, torch.device(device), dtype) * _OVERHEAD[device]
    return Forecast(
        device=device,
        precision=precision,
        parameters=parameters,
        parameter_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=2 * weights,
        frozen_bytes=frozen,
        activation_bytes=activations,
        batch_bytes=batch,
        host_batch_bytes=host,
        peak_bytes=4 * weights + frozen + activations + (batch if is_cuda else host),
        sequences=len(data.split.train),
        steps=data.steps,
        step_tokens=config.step_tokens,
        batches_per_step=data.batches_per_step,
        tokens=tokens,
        flops_per_step=flops,
        step_s=round(step_s, 4),
        total_s=round(step_s * data.steps, 1),
        checkpoint_bytes=12 * parameters,
        fetched_bytes=_fetched_bytes(config, stores),
    )


def _largest(data: FeatureData) -> BatchPlan:
    """Return the batch with the most tokens."""
    plans = (plan for step in range(1, data.steps + 1) for plan in data.step_plans(step))
    return max(plans, key=lambda plan: _tokens(plan.sequences, data))


def _supervised_share(data: FeatureData) -> float:
    """Return the share of the tokens of the largest step that are computed at every unrolled step."""
    step = max(data.plan, key=lambda step: _tokens(step, data))
    batch = read_batch(data.corpus, BatchPlan(step), data.lengths, labels_only=True)
    return float(supervised_anchors(batch, 1).float().mean())


def _tokens(sequences: Group, data: FeatureData) -> int:
    return sum(data.lengths[sequence] for sequence in sequences)


def _batch_bytes(room: int, corpus: Corpus) -> int:
    info = corpus.info
    kept = 2 * info.hidden_size if info.last_hidden else 10 * info.top_k
    # Ids, argmax, documents and positions of 8 bytes, a mask of 1 and a log-sum-exp of 4.
    return room * (2 * len(corpus.boundaries) * info.hidden_size + kept + 37)


def _flops_per_s(spec: DraftSpec, room: int, device: torch.device, dtype: torch.dtype) -> float:
    """Measure the draft's own MLP product, which is the most of its work."""
    rows = max(64, min(room, 4096))
    one = torch.randn(rows, spec.hidden_size, device=device, dtype=dtype)
    other = torch.randn(spec.hidden_size, spec.intermediate_size, device=device, dtype=dtype)
    times: list[float] = []
    began = time.monotonic()
    while len(times) < 3 or time.monotonic() - began < _MEASURED_S:
        start = time.monotonic()
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
    return 2 * rows * spec.hidden_size * spec.intermediate_size / min(times)


def _fetched_bytes(config: TrainConfig, stores: list[FeatureStore]) -> int:
    """Estimate what ``shuffle_parts`` parts take, from the first few."""
    total = 0
    for store in stores:
        if store.place.is_remote and (units := list(store.records)):
            known = [sum(one.size for one in store.records[unit].objects) for unit in units[:_PARTS_LOOKED_AT]]
            total += sum(known) // len(known) * min(config.shuffle_parts or len(units), len(units))
    return total
