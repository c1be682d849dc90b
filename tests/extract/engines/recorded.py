"""Run by ``test_vllm``: the vLLM engine whole in one process, where what it hands to the store can be listened to.

Usage: recorded.py JOB.json RESULT.json. The job holds

    settings  those of ``specx extract``; ``data`` is one Parquet file of token ids, ``limit`` the rows to take
    store     one that exists; the first ``record`` rows are also kept as they come, not rounded, in ``recording``
    alone     another that exists; after all others the first row is run again, alone, into this one
    version   what vLLM says its version is, if not its own

and the result tells what the engine reported, warned of, and finds wrong with false requests.

Shapes: T tokens, L boundaries, H hidden size.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
import pyarrow.parquet as pq
import torch
import vllm
from safetensors.torch import save_file
from torch import nn
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

from specx import SpecxError
from specx.extract.config import ExtractConfig
from specx.extract.data.samples import Sample
from specx.extract.engines.base import ExtractionEngine
from specx.extract.engines.factory import open_engine
from specx.extract.engines.sink import OnCpu, Outcome, Ready, Sink
from specx.extract.engines.vllm.connector import Extractor, FeatureWorker, FinishedRequest
from specx.extract.target import open_target
from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.schema import DatasetInfo, Origin, Reject
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter


class Recorder:
    """Stands before a sink and keeps the hidden states of the first rows."""

    def __init__(self, sink: Sink, rows: int) -> None:
        self._sink = sink
        self._rows = rows
        self.recorded: dict[str, torch.Tensor] = {}
        """Row of the data -> (T, L + 1, H), the last hidden state behind the others."""

    def put(self, sample: Sample, ready: Ready) -> None:
        outputs = ready.wait()
        if sample.origin.row < self._rows:
            states = torch.cat((outputs.aux_hidden, outputs.last_hidden[:, None]), dim=1)
            self.recorded[str(sample.origin.row)] = states.contiguous()
        self._sink.put(sample, OnCpu(outputs))

    def reject(self, reject: Reject) -> None:
        self._sink.reject(reject)

    def take(self) -> Outcome:
        return self._sink.take()

    def finish(self) -> None:
        self._sink.finish()

    def close(self) -> None:
        self._sink.close()


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def samples(file: str) -> Iterator[Sample]:
    for row, columns in enumerate(pq.read_table(file).to_pylist()):
        yield Sample(
            input_ids=np.asarray(columns["input_ids"], np.int32),
            loss_mask=np.asarray(columns["loss_mask"], np.uint8),
            origin=Origin(source=file, row=row, category=columns["category"]),
        )


def extract(engine: ExtractionEngine, rows: list[Sample]) -> Outcome:
    outcome = Outcome()
    for sample in rows:
        engine.add(sample)
        outcome.add(engine.take())
    engine.finish()
    outcome.add(engine.take())
    return outcome


def complaints(info: DatasetInfo) -> dict[str, str]:
    """Return what is said of requests that are not what vLLM was given, and of a model without a head."""
    norm, head = nn.Identity(), nn.Linear(info.hidden_size, info.vocab_size)
    handed: list[Ready] = []
    sink: Any = SimpleNamespace(put=lambda sample, ready: handed.append(ready))
    extractor = Extractor(SimpleNamespace(model=SimpleNamespace(norm=norm), compute_logits=head), info, sink)
    states = torch.randn(3, len(info.boundaries) + 1, info.hidden_size)
    logits = head(states[-1, -1])
    ids = np.asarray([5, 6, 7], np.int32)
    params = {"id": sequence_id(ids), "loss_mask": bytes(3), "source": "rows", "row": 4, "category": "", "rejects": []}
    sound = FinishedRequest(
        request_id="0", input_ids=ids.tolist(), sampled=int(logits.argmax()), blocks=[], params=params
    )
    requests = {
        "sound": (sound, states),
        "another token": (replace(sound, sampled=int(logits.argmin())), states),
        "too few": (sound, states[1:]),
        "other ids": (replace(sound, input_ids=[5, 6, 8]), states),
    }
    found = {}
    for name, (request, rows) in requests.items():
        with torch.inference_mode():
            extractor.extract(request, iter([rows]))
        try:
            handed.pop().wait()
        except SpecxError as error:
            found[name] = str(error)
    worker = FeatureWorker()
    headless = SimpleNamespace(model=SimpleNamespace(norm=norm))
    worker.model_runner = SimpleNamespace(get_model=lambda: headless)
    found["no head"] = str(worker.specx_open("store", 1, 1))
    return found


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    vllm.__version__ = job["version"] or vllm.__version__
    warnings = Lines()
    logging.getLogger("specx").addHandler(warnings)
    config = ExtractConfig(**job["settings"])
    target, info = open_target(config.target), FeatureStore.open(config.store).info
    engine = open_engine(config, target, info)
    extractor = get_kv_transfer_group().extractor
    recorder = extractor.sink = Recorder(extractor.sink, job["record"])
    rows = list(samples(*config.data))[: config.limit]
    outcome = extract(engine, rows)
    save_file(recorder.recorded, job["recording"])
    writer = FeatureWriter(FeatureStore.open(job["alone"]), tokens_per_part=config.tokens_per_part)
    extractor.sink = Sink(writer, queue_bytes=config.queue_bytes)
    alone = extract(engine, rows[:1])
    counters = {metric.name: metric.value for metric in get_metrics_snapshot() if isinstance(metric, Counter)}
    result = {
        "sequences": len(outcome.committed),
        "tokens": outcome.tokens,
        "rejects": [reject.model_dump() for reject in outcome.rejects],
        "alone": len(alone.committed),
        "warnings": warnings.lines,
        "preemptions": counters.get("vllm:num_preemptions"),
        "complaints": complaints(info),
    }
    Path(result_file).write_text(json.dumps(result))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
