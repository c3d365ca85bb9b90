"""ONNX Runtime alone: threads of this process that call one session in a loop, and nothing else."""

import threading
import time

from benchmarks.agent.load import Load
from benchmarks.agent.models import BenchModel
from edge_agent.inference.ort import OrtEngine, OrtSession


def session_of(model: BenchModel) -> OrtSession:
    """A session with our engine's options, warm."""
    session = OrtEngine().load(model.path)
    session.run(model.feeds, [spec.name for spec in session.outputs])
    return session


def run(session: OrtSession, model: BenchModel, threads: int, seconds: float) -> tuple[Load, float]:
    """What `threads` of them answer in `seconds`, and the CPU time of this process meanwhile in seconds."""
    outputs = [spec.name for spec in session.outputs]
    waits_s: list[list[float]] = [[] for _ in range(threads)]
    until = time.perf_counter() + seconds

    def work(waits: list[float]) -> None:
        before = time.perf_counter()
        while before < until:
            session.run(model.feeds, outputs)
            after = time.perf_counter()
            waits.append(after - before)
            before = after

    began, spent = time.perf_counter(), time.process_time()
    workers = [threading.Thread(target=work, args=(waits,)) for waits in waits_s]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took, used = time.perf_counter() - began, time.process_time() - spent
    every = sorted(wait for waits in waits_s for wait in waits)
    middle, late = every[len(every) // 2], every[len(every) * 99 // 100]
    return Load(len(every), took, 0, middle * 1e3, late * 1e3), used
