"""An idle device asked by one caller in its own process: `ModelServer.infer_here` beside ONNX Runtime alone."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from benchmarks.agent.models import BenchModel
from benchmarks.agent.ours import MODEL, place
from benchmarks.agent.raw import session_of
from common.clock import SystemClock
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder


class Waits(NamedTuple):
    """Medians of how long the caller waits, in milliseconds."""

    model: str
    raw_ms: float
    library_ms: float


async def compare(model: BenchModel, requests: int) -> Waits:
    """Requests by the two ways in turns."""
    session = session_of(model)
    outputs = [spec.name for spec in session.outputs]
    clock = SystemClock()
    server = ModelServer(OrtEngine(), Recorder(clock.now()), clock)
    await place(server, model.path, model.declared, "1")
    ways: list[Callable[[], object]] = [
        lambda: session.run(model.feeds, outputs),
        lambda: server.infer_here(MODEL, None, model.feeds),
    ]
    waits: list[list[float]] = [[] for _ in ways]
    for _ in range(requests):
        for way, seen in zip(ways, waits, strict=True):
            before = time.perf_counter()
            way()
            seen.append((time.perf_counter() - before) * 1e3)
    await server.close()
    return Waits(model.name, *map(median, waits))
