"""The whole agent in this process: it serves before it has a network, and lives on HTTP alone while MQTT is silent."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from common.errors import Unavailable
from common.wire import DeviceWindow, TelemetryWindow
from controller.broker.embedded import EmbeddedBroker
from edge_agent.app import Agent
from edge_agent.telemetry.spool import Spool
from tests.conftest import eventually
from tests.faults import FaultProxy
from tests.integration.release_desk import DEVICE, MODEL, ReleaseDesk
from tests.integration.small_agent import agent_at
from tests.integration.small_models import weighted


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


async def ask(agent: Agent) -> str:
    """The version that answers one real request."""
    tensor = {"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": np.zeros(2048, int).tolist()}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{agent.inference_url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}) as response,
    ):
        assert response.status == 200, await response.text()
        version: str = (await response.json())["model_version"]
        return version


async def test_without_a_broker_orders_come_and_reports_go_over_http(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    desk.order(desk.release("1", real_models[0].read_bytes()))
    async with agent_at(tmp_path, desk) as agent:
        await eventually(lambda: desk.reports and any(m.running == "1" for m in desk.reports[-1].models), "it runs")
        assert await ask(agent) == "1"
        await eventually(lambda: desk.not_modified >= 2, "polls without news are answered 304")
        desk.order(desk.release("2", real_models[1].read_bytes()))
        await eventually(
            lambda: any(m.running == "2" and m.phase == "idle" for m in desk.reports[-1].models), "the next one runs"
        )
        assert await ask(agent) == "2"
        status = agent.status()
        assert (status["connected"], status["generation"]) == (False, 2)
    numbers = [(report.epoch, report.seq) for report in desk.reports]
    assert numbers == sorted(set(numbers)), "every report has its own place in the device's history"


@pytest.mark.parametrize("probation_s", [0.1, 3600.0], ids=["committed", "in its first probation"])
async def test_what_is_on_the_device_is_served_before_any_network(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path], probation_s: float
) -> None:
    desk.order(desk.release("1", real_models[0].read_bytes(), probation_s=probation_s))
    async with agent_at(tmp_path, desk):
        await eventually(lambda: desk.reports and any(m.running == "1" for m in desk.reports[-1].models), "it runs")
    await desk.stop()
    async with agent_at(tmp_path, desk) as agent:
        assert await ask(agent) == "1"


async def test_telemetry_stays_on_the_disk_until_somebody_takes_it(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    desk.order(desk.release("1", real_models[0].read_bytes()))
    async with agent_at(tmp_path, desk) as agent:
        await eventually(lambda: desk.reports and any(m.running == "1" for m in desk.reports[-1].models), "it runs")
        await asyncio.gather(*(ask(agent) for _ in range(5)))
    spool = Spool(tmp_path / "telemetry.db")
    windows = [entry.window for entry in spool.peek(100)]
    spool.close()
    releases = [window for window in windows if isinstance(window, TelemetryWindow)]
    assert sum(window.requests for window in releases) >= 5
    assert sum(sum(window.queue_counts or ()) for window in releases) >= 5
    used = [window for window in windows if isinstance(window, DeviceWindow)]
    assert sum(window.cpu_s for window in used) > 0
    assert all(0 < (window.pss_bytes or 1) <= window.rss_bytes for window in used)
    starts = {window.started_at for window in used}
    assert {window.started_at for window in releases} <= starts, "a release's window has its device's beside it"


async def test_an_agent_that_cannot_listen_says_so_and_leaves_nothing_behind(tmp_path: Path, desk: ReleaseDesk) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Unavailable, match="cannot listen"):
            async with agent_at(tmp_path, desk, f"127.0.0.1:{taken.getsockname()[1]}"):
                pass
    async with agent_at(tmp_path, desk) as agent:
        assert agent.inference_url


async def test_an_order_that_the_broker_did_not_bring_is_asked_for_on_every_connection(
    tmp_path: Path, desk: ReleaseDesk
) -> None:
    """The broker holds no order at all here, as if each were lost in the moment of subscribing."""
    broker = EmbeddedBroker(tmp_path / "broker")
    await broker.start()
    await broker.admit(DEVICE, "p")
    desk.order()
    async with (
        FaultProxy(broker.port) as proxy,
        agent_at(tmp_path / "agent", desk, broker_port=proxy.port, poll_s=3600.0) as agent,
    ):
        await eventually(lambda: agent.status()["connected"], "the device is connected")
        await eventually(lambda: agent.status()["generation"] == 1, "it has its first order")
        before = desk.polls
        proxy.refuse = True
        proxy.cut()
        await eventually(lambda: desk.polls > before and not agent.status()["connected"], "it asks without a line")
        desk.order()
        proxy.refuse = False
        await eventually(lambda: agent.status()["connected"], "the device is connected again")
        await eventually(lambda: agent.status()["generation"] == 2, "it has the order that nobody brought")
    await broker.stop()


async def test_an_update_over_its_budget_looks_again_when_a_poll_is_answered(tmp_path: Path, desk: ReleaseDesk) -> None:
    data, _ = weighted(tmp_path / "made", 1, 1)
    desk.order(desk.release("1", data, max_bytes=10))
    async with agent_at(tmp_path / "agent", desk) as agent:
        await eventually(lambda: desk.reports and desk.reports[-1].models, "it reports")
        await eventually(lambda: "cheaper way" in desk.reports[-1].models[0].detail, "it waits for a cheaper way")
        polls, reports = desk.not_modified, len(desk.reports)
        await eventually(lambda: desk.not_modified > polls + 3, "it asks again")
        assert len(desk.reports) == reports, "the same answer is no news"
        assert not desk.asked
        assert agent.status()["models"][0]["phase"] == "fetching"
