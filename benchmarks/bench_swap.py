"""What swaps cost: failed requests, latency for those who ask meanwhile, memory over many of them, and the way back.

Two releases of one model replace each other under a steady 20 requests a second through `ModelServer.infer`, by each of
two ways: loaded plainly, and from the kept optimised graph. `made` is the first swap to a release, which also makes and
keeps the graph. Times with swaps and without take turns in short rounds, so that a busy moment of the machine hits all
of them. Every swap is prepared, switched and committed; nothing between them is waited for but a short pause.

The number of swaps is `SWAPS=N` in the environment, 1000 by default and 40 with `QUICK=1`.
"""

import asyncio
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import uvloop
from onnx import helper, load, save_model

from benchmarks.report import ROOT, Row, at_most, figure, quick, write
from common.artifact import digest_of
from common.artifact.tensors import Array
from common.clock import SystemClock
from common.ids import ModelName, Version
from edge_agent.inference.health import Verdict, judge
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.ort import OrtEngine, OrtSession
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder

COMMAND = "make bench-swap"
MODELS = ROOT / ".demo" / "models"
PATHS = (
    MODELS / "magika-0.6.1" / "magika" / "models" / "standard_v3_2" / "model.onnx",
    MODELS / "magika-0.6.3" / "magika" / "models" / "standard_v3_3" / "model.onnx",
)
MODEL = ModelName("magika")
SWAPS = int(os.environ.get("SWAPS") or (40 if quick() else 1000))
SWAPS_PER_ROUND = 10
ROUNDS = max(2, SWAPS // (2 * SWAPS_PER_ROUND))
RATE_PER_S = 20.0
PAUSE_S = 0.1
ROLLBACKS = 3 if quick() else 20
LOADS = 3 if quick() else 15
PLENTY = 10**12
MB = 1e6

_INTRO = """
Two releases of a real model of 3.2 MB replace each other again and again under 20 requests a second to
`ModelServer.infer`. `plain` loads the model file, `kept` maps the optimised graph that the device keeps, `made` makes
and keeps it. Rounds with swaps of each way and rounds without take turns. A rollback is timed from the answer that
makes the verdict on a release that fails on every input to the first answer after it was taken back. Memory is the
process's resident memory after each round, the median of a tenth of them.
"""


class Traffic(NamedTuple):
    """What steady callers saw."""

    latencies_s: list[float]
    failed: int


class Bench:
    """One server, and the ways to load a release into it."""

    def __init__(self, folder: Path) -> None:
        self.engine = OrtEngine()
        clock = SystemClock()
        self.server = ModelServer(self.engine, Recorder(clock.now()), clock)
        self.cache = OptimisedModels(folder, self.engine, bytes_max=PLENTY, reserve_bytes=0, free=lambda _: PLENTY)
        self.names = tuple(digest_of(path.read_bytes()) for path in PATHS)
        self.feeds: dict[str, Array] = {"bytes": np.random.default_rng(1).integers(0, 257, (1, 2048), np.int32)}
        session = self.engine.load(PATHS[0])
        self.signature = session.inputs, session.outputs
        session.close()
        self.swaps = 0

    def plain(self, which: int) -> OrtSession:
        return self.engine.load(PATHS[which])

    def kept(self, which: int) -> object:
        return self.cache.load(MODEL, PATHS[which], self.names[which])

    def made(self, which: int) -> object:
        self.cache.tidy(MODEL, [name for name in self.names if name != self.names[which]])
        return self.kept(which)

    async def swap(self, way: Callable[[int], object], path: Path | None = None) -> None:
        """To the other release, committed."""
        await self.switch(way, path)
        await self.server.commit(MODEL)

    async def switch(self, way: Callable[[int], object], path: Path | None = None) -> None:
        self.swaps += 1
        which = self.swaps % 2
        inputs, outputs = self.signature
        load_it = None if path else lambda _: way(which)
        version = Version(str(self.swaps))
        self.server.switch(
            await self.server.prepare(MODEL, version, path or PATHS[which], inputs, outputs, load=load_it)  # type: ignore[arg-type]
        )

    async def ask(self) -> None:
        await self.server.infer(MODEL, None, self.feeds)


def main() -> None:
    uvloop.run(_main())


async def _main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "optimised")
        await bench.swap(bench.plain)
        rows = await _swaps(bench)
        rows += _loads(bench)
        rows += await _rollbacks(bench, Path(folder))
        await bench.server.close()
    write("swap", "Swapping releases", rows, _INTRO)


async def _swaps(bench: Bench) -> list[Row]:
    ways: dict[str, Callable[[int], object]] = {"plain": bench.plain, "kept": bench.kept, "made": bench.made}
    seen: dict[str, list[Traffic]] = {name: [] for name in ("idle", *ways)}
    for way in ways.values():
        await bench.swap(way)
    memory: list[float] = []
    done = 0
    for number in range(ROUNDS):
        for name in ("plain", "kept"):
            seen[name].append(await _steady(bench, _round(bench, ways[name], SWAPS_PER_ROUND)))
            done += SWAPS_PER_ROUND
        if number % 5 == 0:
            seen["made"].append(await _steady(bench, _round(bench, bench.made, 4)))
        seen["idle"].append(await _steady(bench, asyncio.sleep(_length(seen["kept"][-1]))))
        memory.append(_resident())
    failed = sum(traffic.failed for rounds in seen.values() for traffic in rounds)
    idle = _p99(seen["idle"])
    tenth = max(1, len(memory) // 10)
    growth = (statistics.median(memory[-tenth:]) / statistics.median(memory[:tenth]) - 1) * 100
    return [
        at_most(f"{done} swaps under load: failed requests", 0, measured=failed, unit="requests", command=COMMAND),
        _limit("p99 to p99 without swaps: kept", 1.4, _p99(seen["kept"]) / idle, "ratio"),
        _figure("p99 to p99 without swaps: plain", _p99(seen["plain"]) / idle, "ratio"),
        _figure("p99 to p99 without swaps: made", _p99(seen["made"]) / idle, "ratio"),
        *(_figure(f"p50, {name}", _p50(rounds) * 1000, "ms") for name, rounds in seen.items()),
        *(_figure(f"p99, {name}", _p99(rounds) * 1000, "ms") for name, rounds in seen.items()),
        _limit(f"memory in the last tenth of {done} swaps over that in the first", 5, growth, "%"),
        _figure("memory after the last swap", memory[-1] / MB, "MB"),
    ]


def _length(traffic: Traffic) -> float:
    return max(1.0, len(traffic.latencies_s) / RATE_PER_S)


async def _round(bench: Bench, way: Callable[[int], object], swaps: int) -> None:
    for _ in range(swaps):
        await bench.swap(way)
        await asyncio.sleep(PAUSE_S)


async def _steady(bench: Bench, meanwhile: Awaitable[object]) -> Traffic:
    """Send at a fixed rate (an open loop: a slow answer does not delay the next request) while `meanwhile` runs."""
    traffic = Traffic([], 0)
    failures: list[BaseException] = []

    async def one() -> None:
        started = time.perf_counter()
        try:
            await bench.ask()
        except Exception as error:  # noqa: BLE001 (whatever it is, a caller got no answer)
            failures.append(error)
        else:
            traffic.latencies_s.append(time.perf_counter() - started)

    background = asyncio.ensure_future(meanwhile)
    requests = []
    while not background.done():
        requests.append(asyncio.create_task(one()))
        await asyncio.sleep(1 / RATE_PER_S)
    await asyncio.gather(background, *requests)
    return traffic._replace(failed=len(failures))


def _loads(bench: Bench) -> list[Row]:
    """CPU time of a load, in turns."""
    ways: dict[str, Callable[[int], object]] = {"plain": bench.plain, "kept": bench.kept, "made": bench.made}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    bench.kept(0).close()  # type: ignore[attr-defined]
    for _ in range(LOADS):
        for name, way in ways.items():
            started = time.process_time()
            session = way(0)
            costs[name].append(time.process_time() - started)
            session.close()  # type: ignore[attr-defined]
    return [_figure(f"CPU of a load: {name}", statistics.median(each) * 1000, "ms") for name, each in costs.items()]


async def _rollbacks(bench: Bench, folder: Path) -> list[Row]:
    """From the answer that makes the verdict to the first answer after the old release is back."""
    broken = _broken(folder / "broken.onnx")
    times: list[float] = []
    for _ in range(ROLLBACKS):
        await bench.switch(bench.plain, broken)
        while judge(bench.server.health(MODEL)) is not Verdict.FAIL:
            await bench.ask()
        started = time.perf_counter()
        reverting = asyncio.ensure_future(bench.server.revert(MODEL))
        await bench.ask()
        await reverting
        times.append(time.perf_counter() - started)
    return [_limit("local rollback from the verdict, the longest", 2, max(times), "s")]


def _broken(path: Path) -> Path:
    """The real model, but all it answers is divided by zero as soon as its input is not all zeros."""
    model = load(PATHS[0])
    graph, output = model.graph, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["bytes"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["asked"], to=1),
            helper.make_node("Neg", ["asked"], ["negative"]),
            helper.make_node("Sqrt", ["negative"], ["root"]),
            helper.make_node("Add", ["before", "root"], [output]),
        ]
    )
    save_model(model, path)
    return path


def _resident() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss)


def _p99(rounds: Sequence[Traffic]) -> float:
    return statistics.quantiles([each for traffic in rounds for each in traffic.latencies_s], n=100)[98]


def _p50(rounds: Sequence[Traffic]) -> float:
    return statistics.median(each for traffic in rounds for each in traffic.latencies_s)


def _limit(what: str, limit: float, measured: float, unit: str) -> Row:
    return at_most(what, limit, measured=measured, unit=unit, command=COMMAND)


def _figure(what: str, measured: float, unit: str) -> Row:
    return figure(what, measured=measured, unit=unit, command=COMMAND)


if __name__ == "__main__":
    main()
