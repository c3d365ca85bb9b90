"""A whole agent in this process on a desk's fleet, small releases for it, and somebody who asks it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from edge_agent.app import Agent
from edge_agent.config import AgentSettings
from edge_agent.identity import BrokerAccess, Identity
from tests.integration.release_desk import DEVICE, MODEL, ReleaseDesk
from tests.integration.small_models import WEIGHTS_FILE, weighted


def identity_at(desk: ReleaseDesk, broker_port: int | None = None) -> Identity:
    """A member of the desk's fleet; without a port its broker is not there."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = broker_port or unused.getsockname()[1]
    return Identity(
        device=DEVICE,
        device_token="token",
        controller_url=desk.url,
        broker=BrokerAccess(url=f"mqtt://127.0.0.1:{port}", username=DEVICE, password="p"),
        client_id=f"{DEVICE}-0123456789abcdef",
        signing_keys=desk.keys,
        heartbeat_s=1.0,
        poll_s=0.2,
    )


@contextlib.asynccontextmanager
async def agent_at(
    folder: Path, desk: ReleaseDesk, listen: str = "127.0.0.1:0", broker_port: int | None = None, poll_s: float = 0.0
) -> AsyncIterator[Agent]:
    settings = AgentSettings(
        data=folder, inference_listen=listen, telemetry_s=0.2, disk_reserve_bytes=0, poll_s=poll_s, defer_s_max=0
    )
    agent = Agent(settings, identity_at(desk, broker_port))
    await agent.start()
    try:
        yield agent
    finally:
        await agent.stop()


def publish(desk: ReleaseDesk, folder: Path, version: int) -> None:
    model, weights = weighted(folder, 0, version)
    desk.order(desk.release(str(version), model, weights={WEIGHTS_FILE: weights}))


async def ask(agent: Agent) -> tuple[str, float]:
    """The version that answers, and the number that the answer shows."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{agent.inference_url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}) as response,
    ):
        assert response.status == 200, await response.text()
        answer = await response.json()
        return answer["model_version"], answer["outputs"][0]["data"][0]


@contextlib.asynccontextmanager
async def traffic(agent: Agent) -> AsyncIterator[list[tuple[str, float]]]:
    """Requests all the while; one that fails fails the test."""
    answers: list[tuple[str, float]] = []

    async def keep_asking() -> None:
        while True:
            answers.append(await ask(agent))
            await asyncio.sleep(0.01)

    asking = asyncio.create_task(keep_asking())
    yield answers
    assert not asking.done(), "a request failed"
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def runs(desk: ReleaseDesk, version: int) -> bool:
    return bool(desk.reports) and any(m.running == str(version) and m.phase == "idle" for m in desk.reports[-1].models)
