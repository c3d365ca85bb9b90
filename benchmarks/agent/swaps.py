"""What callers notice while two real releases replace each other again and again: the short form.

Requests come at a steady rate (an open loop: a slow answer does not delay the next request), over HTTP, to a server in
this process, first alone and then during swaps.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

import aiohttp

from benchmarks.agent.models import MAGIKA, MAGIKA_BEFORE, BenchModel
from benchmarks.agent.ours import MODEL, place
from common.clock import SystemClock
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder

RATE_PER_S: Final = 20.0
PAUSE_S: Final = 0.3


class Traffic(NamedTuple):
    """What steady callers saw."""

    latencies_s: Sequence[float]
    sent: int
    failed: int

    @property
    def p99_ms(self) -> float:
        return statistics.quantiles(self.latencies_s, n=100)[98] * 1e3


class Swapping(NamedTuple):
    """The same traffic without swaps and with them."""

    swaps: int
    idle: Traffic
    busy: Traffic


async def measure(model: BenchModel, swaps: int, idle_s: float) -> Swapping:
    """`swaps` of them, after `idle_s` seconds without."""
    clock = SystemClock()
    server = ModelServer(OrtEngine(), Recorder(clock.now()), clock)
    await place(server, MAGIKA, model.declared, "0")
    listener = await listen(inference_app(server), "127.0.0.1", 0)
    body = model.v2_binary()

    async def swapping() -> None:
        for number in range(1, swaps + 1):
            await place(server, (MAGIKA, MAGIKA_BEFORE)[number % 2], model.declared, str(number))
            await asyncio.sleep(PAUSE_S)

    async with aiohttp.ClientSession() as http:

        async def call() -> None:
            url = f"{listener.url}/v2/models/{MODEL}/infer"
            async with http.post(url, data=body.data, headers=body.headers) as answer:
                await answer.read()
                answer.raise_for_status()

        idle = await _steady(call, asyncio.sleep(idle_s))
        busy = await _steady(call, swapping())
    await listener.close()
    await server.close()
    return Swapping(swaps, idle, busy)


async def _steady(call: Callable[[], Awaitable[None]], meanwhile: Awaitable[object]) -> Traffic:
    latencies: list[float] = []
    failures: list[BaseException] = []

    async def one() -> None:
        started = time.perf_counter()
        try:
            await call()
        except aiohttp.ClientError as error:
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
