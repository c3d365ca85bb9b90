"""A busy device puts the load of a new release off, says why, and loads it in a quieter moment or after a maximum."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from common.clock import SystemClock
from edge_agent.executor import Pacing
from edge_agent.inference.serving import ModelServer
from edge_agent.update.pace import PaceLimits
from edge_agent.vitals import CpuLoad
from tests.conftest import eventually
from tests.integration.agent_bench import device_at
from tests.integration.release_desk import ReleaseDesk


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


def paced(cpu: Callable[[], float], defer_s_max: float) -> Callable[[ModelServer], Pacing]:
    limits = PaceLimits(defer_s_max=defer_s_max)
    return lambda server: Pacing(server, cpu, SystemClock(), limits, sample_s=0.01)


async def test_a_load_waits_while_the_device_is_busy(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    load = [100.0]
    one, two = (path.read_bytes() for path in real_models)
    async with device_at(tmp_path, desk, pacing=paced(lambda: load[0], 3600.0)) as device:
        await device.executor.accept(desk.order(desk.release("1", one)))
        assert (await device.finished(1)).outcome == "succeeded", "a device that serves nothing waits for nothing"
        await device.executor.accept(desk.order(desk.release("2", two)))
        await eventually(
            lambda: device.model and "the CPU is 100 % busy" in device.model.detail, "it says why it waits"
        )
        assert device.model
        assert device.model.phase == "warming"
        assert await device.ask() == ("1", True)
        load[0] = 10.0
        assert (await device.finished(2)).outcome == "succeeded"
        assert device.model.detail == ""


async def test_it_does_not_wait_for_ever(tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]) -> None:
    async with device_at(tmp_path, desk, pacing=paced(lambda: 100.0, 0.1)) as device:
        for order, path in enumerate(real_models, 1):
            await device.executor.accept(desk.order(desk.release(str(order), path.read_bytes())))
            assert (await device.finished(order)).outcome == "succeeded"


def test_the_machine_s_load_is_a_percentage() -> None:
    load = CpuLoad()
    sum(range(1_000_000))
    assert 0.0 <= load.percent() <= 100.0
