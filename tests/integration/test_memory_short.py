"""Devices whose memory does not hold two releases, or not even one more: what they do, and what callers are told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from common.ids import Version
from common.wire import Shadow
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.memory import Memory, needed
from tests.conftest import eventually
from tests.integration.agent_bench import Device, device_at
from tests.integration.release_desk import MODEL, ReleaseDesk, fails_on
from tests.integration.small_models import MODEL as OTHER
from tests.integration.small_models import HeldEngine, X, Y, adder


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


class Ram:
    """Memory for `sessions` of the model at one time, and when it is taken for nearly one more."""

    def __init__(self, sessions: int, size: int) -> None:
        self.sessions = sessions
        self.need = needed(size, None)
        self.device: Device | None = None

    def available(self) -> int:
        held = len(self.device.server.models()) if self.device else 0
        if held < self.sessions:
            return self.need * (self.sessions - held)
        return self.need - 100_000 if held else 0

    def memory(self) -> Memory:
        return Memory(self.available, lambda: None, reserve_bytes=0)


@asynccontextmanager
async def room_for_one(
    folder: Path, desk: ReleaseDesk, data: bytes, engine: HeldEngine | None = None
) -> AsyncIterator[tuple[Device, Ram]]:
    """A device that runs `data` as version 1 and has no memory for another release."""
    ram = Ram(1, len(data))
    async with device_at(folder, desk, memory=ram.memory(), engine=engine) as device:
        ram.device = device
        await device.executor.accept(desk.order(desk.release("1", data)))
        assert (await device.finished(1)).outcome == "succeeded"
        yield device, ram


async def test_where_two_do_not_fit_the_old_release_is_stopped_for_the_new_one(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    two, engine = real_models[1].read_bytes(), HeldEngine()
    async with room_for_one(tmp_path, desk, real_models[0].read_bytes(), engine) as (device, _):
        listener = await listen(inference_app(device.server), "127.0.0.1", 0)
        body = {"inputs": [{"name": "bytes", "shape": [1, 2048], "datatype": "INT32", "data": [7] * 2048}]}
        engine.open.clear()  # the new release stays in its warm-up
        await device.executor.accept(desk.order(desk.release("2", two)))
        await eventually(lambda: device.model and device.model.phase == "replacing", "the old one is stopped")
        assert device.model
        assert device.model.running is None
        assert "MiB are available" in device.model.detail
        async with aiohttp.ClientSession() as http:
            await eventually(lambda: not device.server.models(), "the old one is out of memory")
            async with http.post(f"{listener.url}/v2/models/{MODEL}/infer", json=body) as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"]
                assert "is being replaced" in (await answer.json())["error"]
            engine.open.set()
            assert (await device.finished(2)).outcome == "succeeded"
            async with http.post(f"{listener.url}/v2/models/{MODEL}/infer", json=body) as answer:
                assert (answer.status, (await answer.json())["model_version"]) == (200, "2")
        await listener.close()


def order_of(desk: ReleaseDesk, version: str, data: bytes, shadow: Shadow) -> bytes:
    return desk.order(desk.release(version, data, shadow=shadow))


async def test_where_one_fits_nothing_is_compared_and_the_report_says_so(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    two = real_models[1].read_bytes()
    async with room_for_one(tmp_path, desk, real_models[0].read_bytes()) as (device, _):
        await device.executor.accept(order_of(desk, "2", two, Shadow(for_s=3600, agreement_min=0.99)))
        update = await device.finished(2)
        assert update.outcome == "succeeded"
        assert update.shadow
        assert (update.shadow.verdict, update.shadow.samples) == ("inconclusive", 0)
        assert await device.ask() == ("2", True)


async def test_where_one_fits_an_order_that_must_compare_fails_and_nothing_is_stopped(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    two, engine = real_models[1].read_bytes(), HeldEngine()
    async with room_for_one(tmp_path, desk, real_models[0].read_bytes(), engine) as (device, ram):
        must = Shadow(for_s=0.2, on_few="fail", samples_min=1)
        await device.executor.accept(order_of(desk, "2", two, must))
        update = await device.finished(2)
        assert (update.outcome, update.reason) == ("failed", "shadow_inconclusive")
        assert "so nothing was compared: loading needs about" in update.detail
        assert (len(engine.sessions), engine.sessions[0].closed) == (1, False), "the old one was never stopped"
        ram.sessions = 2  # and the release is not to blame: a newer order tries it again
        await device.executor.accept(order_of(desk, "2", two, must))
        await eventually(lambda: device.model and device.model.phase == "shadowing", "it is compared now")
        assert await device.ask() == ("1", True)
        assert (await device.finished(3)).outcome == "succeeded"


async def test_a_new_release_that_fails_in_the_old_one_s_place_gives_it_back(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    async with room_for_one(tmp_path, desk, real_models[0].read_bytes()) as (device, _):
        await device.executor.accept(desk.order(desk.release("2", fails_on(real_models[0], token=0))))
        update = await device.finished(2)
        assert (update.outcome, update.reason) == ("failed", "model_rejected")
        await eventually(lambda: [one.version for one in device.server.models()] == ["1"], "the old one is loaded")
        assert await device.ask() == ("1", True)


async def test_one_that_turns_out_bad_in_probation_is_replaced_by_loading_the_old_one(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    async with room_for_one(tmp_path, desk, real_models[0].read_bytes()) as (device, _):
        broken = fails_on(real_models[0], token=101)
        await device.executor.accept(desk.order(desk.release("2", broken, probation_s=60.0)))
        await eventually(lambda: device.model and device.model.phase == "probation", "it serves")
        for _ in range(6):
            await asyncio.gather(device.ask(101), return_exceptions=True)
        assert (await device.finished(2)).outcome == "rolled_back"
        await eventually(lambda: [one.version for one in device.server.models()] == ["1"], "the old one is loaded")
        assert await device.ask() == ("1", True)


async def test_a_device_that_died_while_replacing_serves_the_installed_release_again(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    ram, engine = Ram(1, len(one)), HeldEngine()
    device = Device(tmp_path, desk, memory=ram.memory(), engine=engine)
    await device.executor.start()
    ram.device = device
    await device.executor.accept(desk.order(desk.release("1", one)))
    await device.finished(1)
    engine.open.clear()
    await device.executor.accept(desk.order(desk.release("2", two)))
    await eventually(lambda: device.model and device.model.phase == "replacing", "the old one is stopped")
    await device.die()
    engine.open.set()
    ram.device = None
    async with device_at(tmp_path, desk, memory=ram.memory()) as again:
        assert (await again.ask())[0] == "1"
        assert (await again.finished(2)).outcome == "succeeded"


async def test_what_does_not_fit_at_all_waits_and_says_why(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one = real_models[0].read_bytes()
    ram = Ram(0, len(one))
    async with device_at(tmp_path, desk, memory=ram.memory()) as device:
        ram.device = device
        await device.executor.accept(desk.order(desk.release("1", one)))
        await eventually(lambda: device.model and "no_memory" in device.model.detail, "the trouble is reported")
        assert device.model
        assert (device.model.phase, device.model.last_update) == ("warming", None)
        ram.sessions = 1
        assert (await device.finished(1)).outcome == "succeeded"


async def test_one_model_more_than_the_owner_allows_waits(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    async with device_at(tmp_path, desk, models_max=1) as device:
        path = adder(tmp_path / "other.onnx", 1)
        device.server.switch(await device.server.prepare(OTHER, Version("1"), path, X, Y))
        await device.server.commit(OTHER)
        await device.executor.accept(desk.order(desk.release("1", one)))
        await eventually(lambda: device.model and "models_max is 1" in device.model.detail, "the trouble is reported")
        await device.server.retire(OTHER)
        assert (await device.finished(1)).outcome == "succeeded"
        await device.executor.accept(desk.order(desk.release("2", two)))
        assert (await device.finished(2)).outcome == "succeeded", "another release of the same model is no other model"
