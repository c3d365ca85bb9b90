"""Learned batching beside every fixed batch size, by rows each second of one thread.

The fixed sizes run in ONNX Runtime alone, with the batch already put together: what a perfect batcher without any cost
would reach. Ours answers 64 callers, one row each, through `ModelServer` with one thread, after it has had a while to
learn.
"""

import time
from concurrent.futures import Future
from queue import SimpleQueue
from statistics import median
from typing import Final, NamedTuple

import numpy as np

from benchmarks.agent.models import BenchModel
from benchmarks.agent.ours import MODEL, place
from benchmarks.agent.raw import session_of
from common.artifact.tensors import Array
from common.clock import SystemClock
from edge_agent.inference.ort import OrtEngine, OrtSession
from edge_agent.inference.requests import Inference
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder

SIZES: Final = (1, 2, 4, 8, 16, 32)
CALLERS: Final = 64


class Batched(NamedTuple):
    """Rows each second on one model: of every fixed size, and of ours; medians over rounds."""

    model: str
    fixed: dict[int, float]
    ours: float

    @property
    def best(self) -> int:
        """The fixed size with the most rows each second."""
        return max(self.fixed, key=lambda size: self.fixed[size])


async def compare(model: BenchModel, rounds: int, seconds: float, learning_s: float) -> Batched:
    """The sizes and ours in turns of `seconds`, after ours has learned for `learning_s`."""
    session = session_of(model)
    clock = SystemClock()
    server = ModelServer(OrtEngine(), Recorder(clock.now()), clock, workers=1)
    await place(server, model.path, model.declared, "1")
    callers(server, model, learning_s)
    fixed: dict[int, list[float]] = {size: [] for size in SIZES}
    ours = []
    for _ in range(rounds):
        for size, measured in fixed.items():
            measured.append(_fixed(session, _rows(model, size), size, seconds))
        ours.append(callers(server, model, seconds))
    await server.close()
    return Batched(model.name, {size: median(measured) for size, measured in fixed.items()}, median(ours))


def callers(server: ModelServer, model: BenchModel, seconds: float) -> float:
    """Rows each second, asked for by callers of whom each asks again when it has its answer."""
    answers: SimpleQueue[Future[Inference]] = SimpleQueue()

    def ask() -> None:
        server.submit(MODEL, None, model.feeds).add_done_callback(answers.put)

    began, answered = time.perf_counter(), 0
    for _ in range(CALLERS):
        ask()
    while time.perf_counter() - began < seconds:
        answers.get().result()
        answered += 1
        ask()
    for _ in range(CALLERS):  # a large batch is not lost because it ends late
        answers.get().result()
    return (answered + CALLERS) / (time.perf_counter() - began)


def _fixed(session: OrtSession, feeds: dict[str, Array], size: int, seconds: float) -> float:
    outputs = [spec.name for spec in session.outputs]
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        session.run(feeds, outputs)
        runs += 1
    return runs * size / (time.perf_counter() - began)


def _rows(model: BenchModel, size: int) -> dict[str, Array]:
    return {name: np.concatenate([array] * size) for name, array in model.feeds.items()}
