"""A full, read-only or failing disk under a whole agent: it answers, says what it waits for, and goes on."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.crash import recording
from tests.crash.recording import FAIL, LOSE, Recorder, mark
from tests.integration.release_desk import ReleaseDesk
from tests.integration.small_agent import agent_at, ask, publish, runs, traffic
from tests.integration.small_models import WEIGHTS_FILE

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


async def test_a_slot_that_cannot_be_read_at_the_start_gives_way_to_the_other_one(
    folder: Path, desk: ReleaseDesk, tmp_path: Path
) -> None:
    async with agent_at(folder / "data", desk):
        for version in (1, 2):
            publish(desk, tmp_path / "made", version)
            await eventually(lambda version=version: runs(desk, version), "it runs")  # type: ignore[misc]
    mark(folder, f"{LOSE}b:{WEIGHTS_FILE}")
    async with agent_at(folder / "data", desk) as agent:
        assert await ask(agent) == ("1", 1.0)
        await eventually(lambda: not runs(desk, 2), "the last report is not of before the start")
        mark(folder, LOSE)
        await eventually(lambda: runs(desk, 2), "the newer one is fetched again", within_s=90)
        assert await ask(agent) == ("2", 2.0)
