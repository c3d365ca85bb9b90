"""What serving through the agent costs beside the bare engine, and what callers feel while models are swapped.

The same requests go to ONNX Runtime itself, through `ModelServer.infer`, and over HTTP as binary tensors, by 1 and by 8
callers at a time: to a real model of 3.2 MB, and to one that gives its input of 8 kB back, where all that is measured
is the way. The ways take turns in short rounds, so that a busy moment of the machine hits all of them; CPU time is the
whole process's, callers included, and the median round counts. Then callers send 20 requests a second while two
releases of the real model replace each other again and again.
"""

import asyncio
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
import numpy as np
import uvloop
from onnx import TensorProto, helper, save_model

from benchmarks.report import ROOT, Row, at_most, figure, quick, write
from common.artifact.tensors import Array
from common.clock import SystemClock
from common.ids import ModelName, Version
from edge_agent.inference.http import HEADER_LENGTH, inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.ort import OrtEngine, OrtSession
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder

COMMAND = "make bench-agent"
MODELS = ROOT / ".demo" / "models"
PATHS = (
    MODELS / "magika-0.6.1" / "magika" / "models" / "standard_v3_2" / "model.onnx",
    MODELS / "magika-0.6.3" / "magika" / "models" / "standard_v3_3" / "model.onnx",
)
MAGIKA, ECHO = ModelName("magika"), ModelName("echo")
ROUNDS = 4 if quick() else 15
REQUESTS_PER_ROUND = {MAGIKA: 16 if quick() else 80, ECHO: 400 if quick() else 2_000}
CALLERS = (1, 8)
SWAPS = 12 if quick() else 60
RATE_PER_S = 20.0
IDLE_S = 6.0 if quick() else 30.0

Call = Callable[[], Awaitable[object]]


class Cost(NamedTuple):
    """Milliseconds per request: CPU of the whole process, and on the clock."""

    cpu_ms: float
    wall_ms: float


class Ways:
    """The three ways to the same answer of one model, ready to be called."""

    def __init__(
        self, model: ModelName, session: OrtSession, server: ModelServer, url: str, http: aiohttp.ClientSession
    ) -> None:
        self.model = model
        self._session = session
        self._outputs = [spec.name for spec in session.outputs]
        self._server = server
        self._infer_url = f"{url}/v2/models/{model}/infer"
        self._http = http
        self._pool = ThreadPoolExecutor(max(CALLERS))
        self._feeds: dict[str, Array] = {"bytes": np.random.default_rng(1).integers(0, 257, (1, 2048), np.int32)}
        self._body, self._headers = _binary_request(self._feeds["bytes"])

    async def engine(self) -> object:
        """ONNX Runtime alone. It needs a thread too: a call on the event loop would stop everything else."""
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._session.run, self._feeds, self._outputs
        )

    async def library(self) -> object:
        """`ModelServer.infer` in this process."""
        return await self._server.infer(self.model, None, self._feeds)

    async def http(self) -> object:
        """The device's API, binary tensors, on a kept connection."""
        async with self._http.post(self._infer_url, data=self._body, headers=self._headers) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer[:200]!r}")
            return answer


def main() -> None:
    uvloop.run(_main())


async def _main() -> None:
    engine, clock = OrtEngine(), SystemClock()
    server = ModelServer(engine, Recorder(clock.now()), clock)
    listener = await listen(inference_app(server), "127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as folder:
        paths = {MAGIKA: PATHS[0], ECHO: _echo(Path(folder) / "echo.onnx")}
        async with aiohttp.ClientSession() as http:
            rows: list[Row] = []
            for model, path in paths.items():
                session = engine.load(path)
                await _switch(server, model, session, 0, path)
                ways = Ways(model, session, server, listener.url, http)
                rows += [row for callers in CALLERS for row in await _compare(ways, callers)]
                if model == MAGIKA:
                    rows += await _swaps(ways, server, session)
    await listener.close()
    await server.close()
    write("agent", "Serving on the device", rows, _INTRO)


_INTRO = """
One row, answered by ONNX Runtime itself (in a thread pool), by `ModelServer.infer` in the same process, and by the HTTP
API with binary tensors. `magika` is a real model of 3.2 MB; `echo` gives its input of 8 kB back, so its figures are the
cost of the way alone. Engine, server and callers share one process, and the CPU figures hold all of them; medians over
interleaved rounds. `added` is what a way costs on top of the engine. The swaps happen under a steady 20 requests a
second over HTTP; the p99 ratio compares the time of the swaps with the same traffic without them.
"""


async def _compare(ways: Ways, callers: int) -> list[Row]:
    calls: dict[str, Call] = {"engine": ways.engine, "library": ways.library, "HTTP": ways.http}
    requests = REQUESTS_PER_ROUND[ways.model]
    rounds: dict[str, list[Cost]] = {name: [] for name in calls}
    for call in calls.values():
        await _round(call, callers, requests)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            rounds[name].append(await _round(call, callers, requests))
    who = f"{ways.model}, {callers} caller{'s' if callers > 1 else ''}"
    rows = [_median(f"{who}: {name}, CPU", [cost.cpu_ms for cost in costs]) for name, costs in rounds.items()]
    rows += [_median(f"{who}: {name}, time", [cost.wall_ms for cost in costs]) for name, costs in rounds.items()]
    if ways.model == ECHO:
        rows += [_added(f"{who}: added by the library, CPU", 0.25, rounds["library"], rounds["engine"])]
        rows += [_added(f"{who}: added by HTTP and its client, CPU", 1.0, rounds["HTTP"], rounds["engine"])]
    return rows


def _median(what: str, values: Sequence[float]) -> Row:
    return figure(what, measured=statistics.median(values), unit="ms/request", command=COMMAND)


def _added(what: str, limit: float, costs: Sequence[Cost], bare: Sequence[Cost]) -> Row:
    """Paired within a round, so that a slow moment of the machine does not count as overhead."""
    added = statistics.median(own.cpu_ms - other.cpu_ms for own, other in zip(costs, bare, strict=True))
    return _limit(what, limit, added, "ms/request")


async def _round(call: Call, callers: int, requests: int) -> Cost:
    each = requests // callers

    async def caller() -> None:
        for _ in range(each):
            await call()

    cpu, wall = _cpu_s(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    count = each * callers
    return Cost((_cpu_s() - cpu) * 1000 / count, (time.perf_counter() - wall) * 1000 / count)


async def _swaps(ways: Ways, server: ModelServer, session: OrtSession) -> list[Row]:
    """Latencies under a steady rate: first alone, then while releases replace each other."""
    idle = await _steady(ways.http, asyncio.sleep(IDLE_S))

    async def swapping() -> None:
        for number in range(1, SWAPS + 1):
            await _switch(server, MAGIKA, session, number, PATHS[number % 2])
            await asyncio.sleep(0.3)

    busy = await _steady(ways.http, swapping())
    ratio = _p99(busy.latencies_s) / _p99(idle.latencies_s)
    return [
        _limit(f"{SWAPS} swaps under traffic: failed requests", 0, busy.failed, f"of {busy.sent}"),
        _limit(f"{SWAPS} swaps under traffic: p99 to idle p99", 3, ratio, "ratio"),
        figure("idle p50", measured=statistics.median(idle.latencies_s) * 1000, unit="ms", command=COMMAND),
        figure("idle p99", measured=_p99(idle.latencies_s) * 1000, unit="ms", command=COMMAND),
        figure("p99 during swaps", measured=_p99(busy.latencies_s) * 1000, unit="ms", command=COMMAND),
    ]


class Traffic(NamedTuple):
    """What steady callers saw."""

    latencies_s: Sequence[float]
    sent: int
    failed: int


async def _steady(call: Call, meanwhile: Awaitable[object]) -> Traffic:
    """Send at a fixed rate (an open loop: a slow answer does not delay the next request) while `meanwhile` runs."""
    latencies: list[float] = []
    failures: list[BaseException] = []

    async def one() -> None:
        started = time.perf_counter()
        try:
            await call()
        except (RuntimeError, aiohttp.ClientError) as error:
            failures.append(error)
        else:
            latencies.append(time.perf_counter() - started)

    background = asyncio.ensure_future(meanwhile)
    requests = []
    while not background.done():
        requests.append(asyncio.create_task(one()))
        await asyncio.sleep(1 / RATE_PER_S)
    await asyncio.gather(background, *requests)
    return Traffic(latencies, len(requests), len(failures))


async def _switch(server: ModelServer, model: ModelName, session: OrtSession, number: int, path: Path) -> None:
    version = Version(str(number))
    server.switch(await server.prepare(model, version, path, session.inputs, session.outputs))
    await server.commit(model)


def _echo(path: Path) -> Path:
    """A model whose output is its input, of the same type and shape as the real one's."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.INT32, ["n", 2048]) for name in ("bytes", "same")]
    graph = helper.make_graph([helper.make_node("Identity", ["bytes"], ["same"])], "echo", tensors[:1], tensors[1:])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _binary_request(array: Array) -> tuple[bytes, dict[str, str]]:
    data = array.tobytes()
    tensor = {
        "name": "bytes",
        "shape": array.shape,
        "datatype": "INT32",
        "parameters": {"binary_data_size": len(data)},
    }
    header = msgspec.json.encode({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    return header + data, {HEADER_LENGTH: str(len(header))}


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _limit(what: str, limit: float, measured: float, unit: str) -> Row:
    return at_most(what, limit, measured=measured, unit=unit, command=COMMAND)


if __name__ == "__main__":
    main()
