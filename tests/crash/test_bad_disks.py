"""A full, read-only or failing disk under a whole agent: it answers, says what it waits for, and goes on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from edge_agent.app import Agent
from tests.conftest import eventually
from tests.crash import recording
from tests.crash.recording import FAIL, Recorder, mark
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import WEIGHTS_FILE, weighted
from tests.integration.test_agent_app import agent_at

pytestmark = pytest.mark.skipif(bool(recording.available()), reason=recording.available() or "FUSE works")

ERRORS = ("ENOSPC", "EROFS", "EIO")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with Recorder(tmp_path / "disk") as recorder:
        yield recorder.run().recorded


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


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


def waits_for_the_disk(desk: ReleaseDesk) -> bool:
    report = desk.reports[-1]
    said = [report.refused, *(model.detail for model in report.models)]
    return any("disk" in text or "error" in text or "no room" in text for text in said)


@pytest.mark.parametrize("error", ERRORS)
async def test_an_update_waits_for_the_disk_while_requests_are_answered(
    folder: Path, desk: ReleaseDesk, tmp_path: Path, error: str
) -> None:
    publish(desk, tmp_path / "made", 1)
    async with agent_at(folder / "data", desk) as agent:
        await eventually(lambda: runs(desk, 1), "the first release runs")
        async with traffic(agent) as answers:
            mark(folder, FAIL + error)
            publish(desk, tmp_path / "made", 2)
            await eventually(lambda: waits_for_the_disk(desk), "the device says what it waits for", within_s=90)
            assert set(answers) == {("1", 1.0)}
            mark(folder, FAIL)
            await eventually(lambda: runs(desk, 2), "the update goes on by itself", within_s=90)
        assert set(answers) == {("1", 1.0), ("2", 2.0)}


@pytest.mark.parametrize("error", ERRORS)
async def test_an_agent_starts_from_a_bad_disk_and_serves_what_is_installed(
    folder: Path, desk: ReleaseDesk, tmp_path: Path, error: str
) -> None:
    publish(desk, tmp_path / "made", 1)
    async with agent_at(folder / "data", desk):
        await eventually(lambda: runs(desk, 1), "the first release runs")
    mark(folder, FAIL + error)
    async with agent_at(folder / "data", desk) as agent:
        assert await ask(agent) == ("1", 1.0)
        publish(desk, tmp_path / "made", 2)
        await eventually(lambda: waits_for_the_disk(desk), "the device says what it waits for", within_s=90)
        assert await ask(agent) == ("1", 1.0)
    mark(folder, FAIL)
    async with agent_at(folder / "data", desk):
        await eventually(lambda: runs(desk, 2), "the update is carried out when the disk is well", within_s=90)
