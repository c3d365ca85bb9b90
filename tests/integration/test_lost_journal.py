"""A journal that went bad on the disk: what is in the slots serves, and no old order is believed."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.artifact import digest_of
from common.errors import IntegrityFailure
from edge_agent.journal import Journal
from tests.conftest import eventually
from tests.integration.agent_bench import device_at
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import WEIGHTS_FILE, weighted
from tests.integration.test_scrub import answer


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


def order(desk: ReleaseDesk, folder: Path, version: int) -> bytes:
    model, weights = weighted(folder / "made", 0, version)
    return desk.order(desk.release(str(version), model, weights={WEIGHTS_FILE: weights}))


@pytest.mark.parametrize("damage", ["header", "middle", "empty"])
async def test_releases_are_found_again_in_their_slots(tmp_path: Path, desk: ReleaseDesk, damage: str) -> None:
    orders = [order(desk, tmp_path, version) for version in (1, 2)]
    async with device_at(tmp_path, desk) as device:
        for number, envelope in enumerate(orders, 1):
            await device.executor.accept(envelope)
            await device.finished(number)
    spoil(tmp_path / "journal.db", damage)
    asked = desk.asked.total()
    async with device_at(tmp_path, desk) as device:
        assert await answer(device) in {("1", 1.0), ("2", 2.0)}
        assert not await device.executor.accept(orders[0]), "an order that is older than the newest is still refused"
        assert await device.executor.accept(orders[1]), "the newest must be taken up again"
        await device.finished(2)
        assert await answer(device) == ("2", 2.0)
        assert desk.asked.total() == asked, "everything was here"


async def test_a_slot_that_is_not_complete_or_not_signed_is_not_believed(tmp_path: Path, desk: ReleaseDesk) -> None:
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(order(desk, tmp_path, 1))
        await device.finished(1)
    spoil(tmp_path / "journal.db", "header")
    path = tmp_path / "models" / MODEL / "a" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    async with device_at(tmp_path, desk) as device:
        assert not device.server.models()
        await device.executor.accept(desk.newest)
        await eventually(lambda: device.model and device.model.running == "1", "it is fetched again")
        assert desk.sent[digest_of(path.read_bytes())] > 0


async def test_who_only_looks_at_a_damaged_journal_leaves_it_as_it_is(tmp_path: Path, desk: ReleaseDesk) -> None:
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(order(desk, tmp_path, 1))
        await device.finished(1)
    spoil(tmp_path / "journal.db", "header")
    damaged = (tmp_path / "journal.db").read_bytes()
    with pytest.raises(IntegrityFailure):
        Journal(tmp_path / "journal.db", repair=False)
    assert (tmp_path / "journal.db").read_bytes() == damaged


def spoil(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    match damage:
        case "header":
            data[:64] = bytes(64)
        case "middle":
            data[5000 : len(data) - 100] = b"\xff" * (len(data) - 5100)
        case "empty":
            data = bytearray(b"no database")
    path.write_bytes(data)
