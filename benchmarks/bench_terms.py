"""What the terms of a release cost and save: an answer from memory, a rule, and requests of different lengths padded.

One process, no HTTP: what is measured is `ModelServer.infer_here`, on the caller's own thread. Figures are CPU time of
the thread, the median of rounds in which the ways take turns. Padding is measured on a small recurrent model, whose
cost a row is mostly steps, so that batches pay, by eight callers at a time with lengths around 100.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

from benchmarks.report import ROOT, quick
from common.artifact import TensorSpec
from common.artifact.serving import Padding, Route, ServingTerms
from common.artifact.tensors import Array
from common.clock import SystemClock
from common.ids import ModelName, Version
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder

MAGIKA_FILE = ROOT / ".demo" / "models" / "magika-0.6.1" / "magika" / "models" / "standard_v3_2" / "model.onnx"
ROUNDS = 5 if quick() else 15
REQUESTS = 20 if quick() else 50
CALLERS = 8
BURST = 4 * CALLERS
HIDDEN = 32
BURSTS = 15 if quick() else 60


def recurrent(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A model that reads x [n, length, 8] step by step and answers what it holds after each step."""
    chance = np.random.default_rng(1)
    shapes = {"w": (1, 4 * HIDDEN, 8), "r": (1, 4 * HIDDEN, HIDDEN)}
    weights = [
        numpy_helper.from_array(chance.normal(0, 0.2, shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r"], ["held"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["held", "axis"], ["each"]),
        helper.make_node("Transpose", ["each"], ["y"], perm=[1, 0, 2]),
    ]
    weights.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "length", 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "length", HIDDEN])]
    graph = helper.make_graph(nodes, "recurrent", inputs, outputs, weights)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return (TensorSpec("x", "FP32", (-1, -1, 8)),), (TensorSpec("y", "FP32", (-1, -1, HIDDEN)),)


async def serve(
    server: ModelServer,
    model: str,
    path: Path,
    specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    terms: ServingTerms | None = None,
) -> None:
    server.switch(await server.prepare(ModelName(model), Version("1"), path, *specs, serving=terms))
    await server.commit(ModelName(model))


def cpu_us(work: Callable[[], object]) -> float:
    started = time.thread_time()
    for _ in range(REQUESTS):
        work()
    return (time.thread_time() - started) / REQUESTS * 1e6


def compared(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of CPU for each way."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            rounds[name].append(cpu_us(work))
    return {name: statistics.median(seen) for name, seen in rounds.items()}


async def memory_and_rules() -> dict[str, float]:
    server = ModelServer(OrtEngine(), Recorder(0.0), SystemClock())
    raw = OrtEngine().load(MAGIKA_FILE)
    specs = raw.inputs, raw.outputs
    rules = (
        Route("load.waiting > 1000", ModelName("plain")),
        Route('input["bytes"].shape[0] > 99', ModelName("plain")),
    )
    await serve(server, "plain", MAGIKA_FILE, specs)
    await serve(server, "keeps", MAGIKA_FILE, specs, ServingTerms(cache_bytes=16_000_000))
    await serve(server, "rules", MAGIKA_FILE, specs, ServingTerms(routes=rules))
    one = {"bytes": np.full((1, 2048), 7, np.int32)}
    count = iter(range(10**9))

    def other() -> dict[str, Array]:
        return {"bytes": np.full((1, 2048), next(count) % 250, np.int32) + np.arange(2048, dtype=np.int32) % 5}

    def ask(model: str, feeds: dict[str, Array]) -> object:
        return server.infer_here(ModelName(model), None, feeds)

    figures = await asyncio.to_thread(
        compared,
        {
            "nothing kept": lambda: ask("plain", other()),
            "kept, never asked before": lambda: ask("keeps", other() | {"bytes": other()["bytes"] * next(count)}),
            "kept, from memory": lambda: ask("keeps", one),
            "two rules that do not hold": lambda: ask("rules", other()),
        },
    )
    await server.close()
    return figures


def bursts(callers: ThreadPoolExecutor, call: Callable[[int], None]) -> float:
    """Seconds for all bursts."""
    chance = np.random.default_rng(3)
    started = time.perf_counter()
    for _ in range(BURSTS):
        list(callers.map(call, chance.integers(85, 116, BURST).tolist()))
    return time.perf_counter() - started


async def lengths(folder: Path) -> dict[str, float]:
    """Requests a second, by eight callers at a time on one core."""
    specs = recurrent(folder / "recurrent.onnx")
    found: dict[str, float] = {}
    for name, terms in (("as they come", None), ("padded", ServingTerms(padding={"x": Padding(axis=1)}))):
        server = ModelServer(OrtEngine(), Recorder(0.0), SystemClock(), workers=1)
        await serve(server, "recurrent", folder / "recurrent.onnx", specs, terms)

        def call(length: int, server: ModelServer = server) -> None:
            server.submit(ModelName("recurrent"), None, {"x": np.zeros((1, length, 8), np.float32)}).result()

        with ThreadPoolExecutor(CALLERS) as callers:
            await asyncio.to_thread(bursts, callers, call)  # the device learns
            seconds = await asyncio.to_thread(bursts, callers, call)
        found[name] = BURSTS * BURST / seconds
        if kept := server.kept_terms():
            print(f"padding: {kept[0].padding}")
        await server.close()
    return found


def main() -> None:
    """Print the figures."""
    for name, micros in asyncio.run(memory_and_rules()).items():
        print(f"{name:28} {micros:8.0f} us of CPU a request")
    with tempfile.TemporaryDirectory() as folder:
        for name, rate in asyncio.run(lengths(Path(folder))).items():
            print(f"{name:28} {rate:8.0f} requests/s")


if __name__ == "__main__":
    main()
