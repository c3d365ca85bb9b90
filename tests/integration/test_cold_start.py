"""Models that are in memory only while somebody asks for them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from common.artifact.serving import ServingTerms
from common.clock import SystemClock
from common.errors import DeadlineExceeded, NotFound, Unavailable
from common.wire import Shadow
from edge_agent.executor import ColdStart
from edge_agent.inference import asleep
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.requests import Overloaded, Terms
from tests.conftest import eventually
from tests.integration.agent_bench import Device, device_at
from tests.integration.release_desk import MODEL, ONNX_FILE, ReleaseDesk, fails_on
from tests.integration.small_models import HeldEngine

LAZY = ColdStart(mode="lazy", idle_s=3600.0)
FEEDS = {"bytes": np.full((1, 2048), 7, np.int32)}
PLENTY = 10**12


@pytest.fixture
async def desk(real_models: tuple[Path, Path]) -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


@pytest.fixture
async def installed(tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]) -> Path:
    """A data folder with one release installed."""
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", real_models[0].read_bytes())))
        await device.finished(1)
    return tmp_path


class Later(SystemClock):
    """A clock that can be put forward."""

    ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


async def test_a_lazy_model_is_loaded_by_the_first_request_and_leaves_when_nobody_asks(
    installed: Path, desk: ReleaseDesk
) -> None:
    engine, clock = HeldEngine(), Later()
    async with device_at(installed, desk, engine=engine, cold=LAZY, clock=clock) as device:
        assert engine.sessions == []
        (served,) = device.server.models()
        assert (served.version, served.in_memory) == ("1", False)
        assert await asyncio.gather(*(device.ask() for _ in range(5))) == [("1", True)] * 5
        assert len(engine.sessions) == 1, "one load for all who waited"
        assert device.server.in_memory() == {MODEL}
        clock.ahead = 3601.0
        await eventually(lambda: engine.sessions[0].closed, "it leaves the memory")
        assert await device.ask() == ("1", True)
        assert len(engine.sessions) == 2


async def test_callers_on_threads_and_other_loops_wake_it_too(installed: Path, desk: ReleaseDesk) -> None:
    async with device_at(installed, desk, cold=LAZY) as device:
        answer = await asyncio.to_thread(device.server.infer_here, MODEL, None, FEEDS)
        assert answer.version == "1"
        await device.server.rest(MODEL)
        assert (await asyncio.wrap_future(device.server.submit(MODEL, None, FEEDS))).version == "1"


async def test_a_prewarmed_model_has_its_optimised_graph_before_the_first_request(
    installed: Path, desk: ReleaseDesk
) -> None:
    engine = OrtEngine()
    cache = OptimisedModels(installed / "optimised", engine, bytes_max=PLENTY, reserve_bytes=0, free=lambda _: PLENTY)
    async with device_at(installed, desk, cold=ColdStart(mode="prewarmed"), optimised=cache) as device:
        assert device.server.in_memory() == frozenset()
        assert cache.size > 3_000_000
        assert await device.ask() == ("1", True)


async def test_waiting_is_bounded_in_number_and_time(
    installed: Path, desk: ReleaseDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asleep, "WAITERS_MAX", 2)
    engine = HeldEngine()
    async with device_at(installed, desk, engine=engine, cold=LAZY) as device:
        engine.open.clear()
        waiting = [asyncio.create_task(device.ask()) for _ in range(2)]
        await eventually(lambda: engine.sessions, "the load has begun")
        with pytest.raises(Overloaded):
            await device.ask()
        engine.open.set()
        assert await asyncio.gather(*waiting) == [("1", True)] * 2
        await device.server.rest(MODEL)
        engine.open.clear()
        with pytest.raises(DeadlineExceeded):
            await device.server.infer(MODEL, None, FEEDS, terms=Terms(timeout_s=0.05))
        engine.open.set()
        assert await device.ask() == ("1", True)


async def test_who_waits_is_not_forgotten_when_it_is_put_to_sleep_again(installed: Path, desk: ReleaseDesk) -> None:
    async with device_at(installed, desk, cold=LAZY) as device:
        loads, device.server.waking.ask_for = device.server.waking.ask_for, lambda _: None  # as if it got lost
        waiting = asyncio.create_task(device.ask())
        await asyncio.sleep(0)
        device.server.waking.ask_for = loads
        lane = device.executor._lanes[MODEL]
        assert lane.state.installed
        await lane._serve(lane.state.installed, awake=False)
        assert await waiting == ("1", True)


async def test_a_load_that_fails_is_an_error_for_those_who_wait_and_is_reported(
    installed: Path, desk: ReleaseDesk
) -> None:
    async with device_at(installed, desk, cold=LAZY) as device:
        device.slots.path(MODEL, "a", ONNX_FILE).write_bytes(b"rotten")
        with pytest.raises(Unavailable, match="could not be loaded"):
            await device.ask()
        await eventually(lambda: device.model and device.model.running == "1", "it is fetched again")
        await eventually(device.server.models, "and served again")
        assert await device.ask() == ("1", True)


async def test_an_update_proves_its_candidate_by_loading_it(
    installed: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    engine = HeldEngine()
    async with device_at(installed, desk, engine=engine, cold=LAZY) as device:
        await device.executor.accept(desk.order(desk.release("2", fails_on(real_models[0], token=0))))
        assert (await device.finished(2)).outcome == "failed"
        await device.executor.accept(desk.order(desk.release("3", real_models[1].read_bytes())))
        assert (await device.finished(3)).outcome == "succeeded"
        assert await device.ask() == ("3", True)


@asynccontextmanager
async def api_of(device: Device) -> AsyncIterator[str]:
    listener = await listen(inference_app(device.server), "127.0.0.1", 0)
    yield listener.url
    await listener.close()


async def test_the_api_tells_and_moves_what_is_loaded_on_demand(installed: Path, desk: ReleaseDesk) -> None:
    async with device_at(installed, desk, cold=LAZY) as device, api_of(device) as url, aiohttp.ClientSession() as http:

        async def state() -> tuple[str, str]:
            async with http.post(f"{url}/v2/repository/index", json={}) as answer:
                (entry,) = await answer.json()
                return entry["state"], entry["reason"]

        async def move(verb: str) -> int:
            async with http.post(f"{url}/v2/repository/models/{MODEL}/{verb}", json={}) as answer:
                return answer.status

        assert await state() == ("READY", "not in memory; a request loads it")
        async with http.get(f"{url}/v2/models/{MODEL}/ready") as answer:
            assert answer.status == 200, "a request will be answered"
        assert device.server.in_memory() == frozenset()
        assert await move("load") == 200
        assert device.server.in_memory() == {MODEL}
        assert await state() == ("READY", "")
        assert await move("unload") == 200
        assert device.server.in_memory() == frozenset()
    async with device_at(installed, desk) as device, api_of(device) as url, aiohttp.ClientSession() as http:
        assert await move("unload") == 403, "a resident model is the fleet's"


async def test_a_request_over_http_wakes_it_unless_it_names_another_version(installed: Path, desk: ReleaseDesk) -> None:
    body = {"inputs": [{"name": "bytes", "shape": [1, 2048], "datatype": "INT32", "data": [7] * 2048}]}
    async with device_at(installed, desk, cold=LAZY) as device, api_of(device) as url, aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v2/models/{MODEL}/versions/9/infer", json=body) as answer:
            assert answer.status == 404
            assert "ask for 1" in (await answer.json())["error"]
        assert device.server.in_memory() == frozenset()
        async with http.post(f"{url}/v2/models/{MODEL}/infer", json=body) as answer:
            assert (answer.status, (await answer.json())["model_version"]) == (200, "1")


async def test_answers_from_memory_keep_it_awake(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    clock = Later()
    async with device_at(tmp_path, desk, cold=LAZY, clock=clock) as device:
        keeps = ServingTerms(cache_bytes=1_000_000)
        await device.executor.accept(desk.order(desk.release("1", real_models[0].read_bytes(), serving=keeps)))
        await device.finished(1)
        await device.ask()
        clock.ahead = 3000.0
        assert (await device.server.infer(MODEL, None, FEEDS)).recalled
        clock.ahead = 4000.0
        assert not device.server.is_idle(MODEL, LAZY.idle_s), "somebody asked 1000 seconds ago"
        clock.ahead = 6700.0
        await eventually(lambda: not device.server.in_memory(), "it leaves the memory")
        assert not (await device.server.infer(MODEL, None, FEEDS)).recalled, "and has given up its answers"


async def test_a_comparison_wakes_what_it_compares_with(
    installed: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    async with device_at(installed, desk, cold=LAZY) as device:
        terms = Shadow(for_s=4.0, agree="top1", samples_min=1)
        await device.executor.accept(desk.order(desk.release("2", real_models[1].read_bytes(), shadow=terms)))
        await eventually(lambda: device.model and device.model.phase == "shadowing", "it is compared")
        assert device.server.in_memory() == frozenset(), "nobody has asked yet"
        assert {await device.ask() for _ in range(3)} == {("1", True)}
        update = await device.finished(2)
        assert update.outcome == "succeeded"
        assert update.shadow
        assert update.shadow.samples >= 1


async def test_a_model_that_is_withdrawn_in_its_sleep_is_gone(installed: Path, desk: ReleaseDesk) -> None:
    async with device_at(installed, desk, cold=LAZY) as device:
        await device.executor.accept(desk.order())
        await eventually(lambda: not device.server.models(), "it is out of service")
        with pytest.raises(NotFound):
            await device.ask()
