"""Files that go bad on the disk are noticed and mended while the release goes on answering."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from common.artifact import digest_of
from edge_agent.executor.scrub import Scrub
from edge_agent.inference.optimised import GRAPH_FILE, OptimisedModels
from edge_agent.inference.ort import OrtEngine
from edge_agent.update import MANIFEST_FILE, Stage
from tests.conftest import eventually
from tests.integration.agent_bench import PLENTY, Device, device_at
from tests.integration.release_desk import MODEL, ONNX_FILE, ReleaseDesk
from tests.integration.small_models import WEIGHTS_FILE, mapped, weighted


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


async def install(device: Device, desk: ReleaseDesk, folder: Path, version: int, *, maps: bool = False) -> None:
    model, weights = mapped(folder / "made", version) if maps else weighted(folder / "made", 0, version)
    await device.executor.accept(desk.order(desk.release(str(version), model, weights={WEIGHTS_FILE: weights})))
    await device.finished(desk.generation)
    await eventually(lambda: device.executor._lanes[MODEL].state.stage is Stage.IDLE, "it is installed")


async def answer(device: Device) -> tuple[str, float]:
    answered = await device.server.infer(MODEL, None, {"x": np.zeros((1, 4), np.float32)})
    return str(answered.version), float(answered.outputs["y"].flat[0])


def scrub(device: Device) -> Scrub:
    return Scrub(device.executor._parts, lambda: list(device.executor._lanes.values()))


def rot(path: Path) -> bytes:
    """Flip a byte in the middle of a file; returns what it was."""
    right = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(right) // 2)
        file.write(bytes([right[len(right) // 2] ^ 1]))
        os.fsync(file.fileno())
    return right


def slot_file(device: Device, name: str, *, previous: bool = False) -> Path:
    state = device.executor._lanes[MODEL].state
    release = state.previous if previous else state.installed
    assert release
    return device.slots.file(MODEL, release.slot, name)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, ONNX_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("previous", [False, True], ids=["installed", "previous"])
async def test_a_file_that_went_bad_is_mended_under_the_release_that_serves(
    tmp_path: Path, desk: ReleaseDesk, name: str, previous: bool
) -> None:
    async with device_at(tmp_path, desk) as device:
        for version in (1, 2):
            await install(device, desk, tmp_path, version)
        path = slot_file(device, name, previous=previous)
        right = rot(path)
        await scrub(device).look()
        assert path.read_bytes() == right
        await device.executor._lanes[MODEL].settled()
        assert await answer(device) == ("2", 2.0)
        assert device.model
        assert (device.model.running, device.model.detail) == ("2", "")
        assert device.executor._parts.findings.take() == (1, 1)
        assert not list((tmp_path / "downloads").iterdir())
        again = desk.asked.total()
        await scrub(device).look()
        assert desk.asked.total() == again, "there is nothing left to mend"


async def test_an_optimised_graph_that_went_bad_is_made_again_and_mapped_anew(
    tmp_path: Path, desk: ReleaseDesk
) -> None:
    engine = OrtEngine()
    cache = OptimisedModels(tmp_path / "optimised", engine, model_bytes_min=0, reserve_bytes=0, free=lambda _: PLENTY)
    async with device_at(tmp_path, desk, engine=engine, optimised=cache) as device:
        await install(device, desk, tmp_path, 1)
        graph = next(file.path for file in cache.kept(MODEL) if file.path.name == GRAPH_FILE)
        served = device.server._placements[MODEL].current
        right = rot(graph)
        await scrub(device).look()
        await device.executor._lanes[MODEL].settled()
        assert graph.read_bytes() == right
        assert device.server._placements[MODEL].current is not served, "what it had mapped was bad"
        assert await answer(device) == ("1", 1.0)
        assert device.executor._parts.findings.take() == (1, 1)
        served = device.server._placements[MODEL].current
        await scrub(device).look()
        await device.executor._lanes[MODEL].settled()
        assert device.server._placements[MODEL].current is served, "there is nothing left to mend"


async def test_what_the_other_slot_has_is_not_fetched(tmp_path: Path, desk: ReleaseDesk) -> None:
    async with device_at(tmp_path, desk) as device:
        for version in (1, 2):  # both have the same ONNX file
            await install(device, desk, tmp_path, version)
        rot(slot_file(device, ONNX_FILE))
        asked = desk.asked.total()
        await scrub(device).look()
        assert desk.asked.total() == asked
        assert digest_of(slot_file(device, ONNX_FILE).read_bytes()) == digest_of(
            slot_file(device, ONNX_FILE, previous=True).read_bytes()
        )


async def test_without_a_network_the_damage_is_reported_and_mended_later(tmp_path: Path, desk: ReleaseDesk) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, tmp_path, 1)
        right = rot(slot_file(device, WEIGHTS_FILE))
        desk.offline = True
        await scrub(device).look()
        assert device.model
        assert "went bad" in device.model.detail
        assert await answer(device) == ("1", 1.0)
        desk.offline = False
        await scrub(device).look()
        assert slot_file(device, WEIGHTS_FILE).read_bytes() == right
        assert device.model
        assert device.model.detail == ""


async def test_a_file_that_is_gone_is_put_back(tmp_path: Path, desk: ReleaseDesk) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, tmp_path, 1)
        path = slot_file(device, WEIGHTS_FILE)
        right = path.read_bytes()
        path.unlink()
        await scrub(device).look()
        assert path.read_bytes() == right


async def test_a_disk_that_cannot_be_read_is_reported(
    tmp_path: Path, desk: ReleaseDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, tmp_path, 1)
        bad, looked = slot_file(device, WEIGHTS_FILE), Path.open

        def failing(self: Path, *arguments: object, **named: object) -> object:
            if self == bad:
                raise OSError(errno.EIO, "the sector is gone")
            return looked(self, *arguments, **named)  # type: ignore[call-overload]

        monkeypatch.setattr(Path, "open", failing)
        await scrub(device).look()
        monkeypatch.undo()
        await device.executor._lanes[MODEL].settled()
        assert await answer(device) == ("1", 1.0)
        assert bad.read_bytes()


async def test_a_session_that_has_the_bad_file_mapped_is_replaced(tmp_path: Path, desk: ReleaseDesk) -> None:
    """Weights beside the ONNX file are mapped, not read: what goes bad there may reach the answers."""
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, tmp_path, 1, maps=True)
        assert any(str(slot_file(device, WEIGHTS_FILE)) in line for line in maps())
        rot(slot_file(device, WEIGHTS_FILE))
        await scrub(device).look()
        await device.executor._lanes[MODEL].settled()
        await eventually(lambda: not any("deleted" in line for line in maps()), "the bad file is let go")
        assert any(str(slot_file(device, WEIGHTS_FILE)) in line for line in maps())
        assert await answer(device) == ("1", 1.0)


def maps() -> list[str]:
    """The model files that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS_FILE in line]


async def test_a_slot_that_an_update_is_writing_is_left_alone(tmp_path: Path, desk: ReleaseDesk) -> None:
    async with device_at(tmp_path, desk) as device:
        for version in (1, 2):
            await install(device, desk, tmp_path, version)
        rot(slot_file(device, WEIGHTS_FILE, previous=True))
        looking = asyncio.create_task(scrub(device).look())
        await install(device, desk, tmp_path, 3)
        await looking
        await scrub(device).look()
        state = device.executor._lanes[MODEL].state
        for release in (state.installed, state.previous):
            assert release
            assert device.slots.verify(MODEL, release.slot, release.files, release.manifest)
        assert await answer(device) == ("3", 3.0)
