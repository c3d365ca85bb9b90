"""A controller that answers nonsense, a line that drips, a clock that jumps: the device serves, waits and goes on."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from common.clock import SystemClock
from common.errors import Unavailable
from edge_agent.fetch import FetchLimits, make_fetcher, open_session, twin
from edge_agent.update import Stage
from tests.blob_server import TOKEN, BlobServer
from tests.conftest import eventually
from tests.integration.agent_bench import device_at
from tests.integration.release_desk import MODEL, Misbehaviour, ReleaseDesk
from tests.integration.small_agent import agent_at, ask, publish, runs, traffic
from tests.integration.small_models import WEIGHTS_FILE, weighted

YEAR_S = 365 * 86_400.0
HUGE_BYTES = 8 * 1024 * 1024


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


async def fails(_: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text="Traceback (most recent call last)...")


async def redirects_for_ever(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": str(request.url)})


async def answers_garbage(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b"\x00\xff<html>welcome to this hotel", headers={"ETag": '"x"'})


async def answers_too_much(_: web.Request) -> web.StreamResponse:
    return web.Response(body=bytes(HUGE_BYTES), headers={"ETag": '"x"'})


async def drips(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(HUGE_BYTES)})
    await response.prepare(request)
    while True:
        await response.write(b"x")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("misbehave", [fails, redirects_for_ever, answers_garbage, answers_too_much, drips])
async def test_a_controller_that_misbehaves_costs_an_update_nothing_but_time(
    tmp_path: Path, desk: ReleaseDesk, monkeypatch: pytest.MonkeyPatch, misbehave: Misbehaviour
) -> None:
    monkeypatch.setattr(twin, "REQUEST_TIMEOUT_S", 0.5)
    publish(desk, tmp_path / "made", 1)
    async with agent_at(tmp_path / "data", desk) as agent:
        await eventually(lambda: runs(desk, 1), "the first release runs")
        async with traffic(agent) as answers:
            desk.misbehave = misbehave
            publish(desk, tmp_path / "made", 2)
            before = desk.requests
            await eventually(lambda: desk.requests >= before + 4, "the agent keeps asking", within_s=90)
            assert set(answers) == {("1", 1.0)}
            desk.misbehave = None
            await eventually(lambda: runs(desk, 2), "the update goes on by itself", within_s=90)
        assert await ask(agent) == ("2", 2.0)


async def test_a_download_that_drips_is_given_up_in_time_and_resumed(tmp_path: Path) -> None:
    data = bytes(range(256)) * 400

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        for byte in data:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.01)
        return response

    async with BlobServer() as server, open_session(TOKEN) as session:
        ref, limits = server.add(data), FetchLimits(idle_s=5.0, total_s=0.5)
        fetcher = make_fetcher(server.url, session, None, limits, SystemClock())
        server.misbehave = drip
        with pytest.raises(Unavailable):
            await fetcher.fetch(ref, tmp_path / "model")
        server.misbehave = None
        await fetcher.fetch(ref, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == data


class JumpingClock:
    """A wall clock that goes years forward or back each time it is read; the other one is a real one."""

    def __init__(self) -> None:
        self._jumps = itertools.cycle((30 * YEAR_S, -25 * YEAR_S, 10 * YEAR_S, -40 * YEAR_S))
        self.looks = 0

    def now(self) -> float:
        return time.time() + next(self._jumps)

    def monotonic(self) -> float:
        self.looks += 1
        return time.monotonic()


async def test_a_wall_clock_that_jumps_changes_no_verdict(tmp_path: Path, desk: ReleaseDesk) -> None:
    def order(version: int, probation_s: float) -> bytes:
        model, weights = weighted(tmp_path / "made", 0, version)
        release = desk.release(str(version), model, weights={WEIGHTS_FILE: weights}, probation_s=probation_s)
        return desk.order(release)

    clock = JumpingClock()
    async with device_at(tmp_path, desk, clock=clock) as device:
        desk.offline = True
        await device.executor.accept(order(1, 0.2))
        await eventually(lambda: device.model and device.model.detail, "the download waits")
        desk.offline = False
        assert (await device.finished(1)).outcome == "succeeded"
        await device.executor.accept(order(2, 3600.0))
        await eventually(lambda: device.model and device.model.phase == "probation", "probation")
        looks = clock.looks
        await eventually(lambda: clock.looks > looks + 10, "the candidate is looked at in many decades")
        assert device.executor._lanes[MODEL].state.stage is Stage.PROBATION, "an hour is an hour"
        await device.executor.accept(order(3, 0.2))
        assert (await device.finished(3)).outcome == "succeeded"
