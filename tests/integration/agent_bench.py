"""An agent's inside without the programs around it: journal, slots, engine and executor on a folder, over real HTTP."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from common.backoff import Backoff
from common.clock import Clock, SystemClock
from common.wire import ReportedModel, UpdateReport
from edge_agent.executor import ColdStart, Executor, Pacing, Parts, UpdateLimits
from edge_agent.fetch import FetchLimits, make_fetcher, open_session
from edge_agent.inference.engine import Engine
from edge_agent.inference.live import LiveModels
from edge_agent.inference.memory import Memory
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.journal import Journal
from edge_agent.slots import Slots
from edge_agent.telemetry.recorder import Recorder
from edge_agent.telemetry.usage import Findings
from tests.conftest import eventually
from tests.integration.release_desk import DEVICE, MODEL, ReleaseDesk

PLENTY = 10**12


class Device:
    """One device."""

    def __init__(
        self,
        folder: Path,
        desk: ReleaseDesk,
        free: Callable[[], int] = lambda: PLENTY,
        engine: Engine | None = None,
        stopwatch: Clock | None = None,
        clock: Clock | None = None,
        *,
        custom_ops: bool = False,
        optimised: OptimisedModels | None = None,
        memory: Memory | None = None,
        models_max: int = 0,
        cold: ColdStart = ColdStart(),  # noqa: B008 (frozen)
        pacing: Callable[[ModelServer], Pacing] | None = None,
    ) -> None:
        self.journal = Journal(folder / "journal.db")
        self.slots = Slots(folder, free=lambda _: free())
        clock = clock or SystemClock()
        self.server = ModelServer(
            engine or OrtEngine(),
            Recorder(clock.now()),
            stopwatch or clock,
            workers=2,
            on_demand=lambda _: cold.mode != "resident",
        )
        self.session = open_session("token")
        self.executor = Executor(
            Parts(
                journal=self.journal,
                slots=self.slots,
                fetcher=make_fetcher(desk.url, self.session, None, FetchLimits(), clock),
                server=self.server,
                clock=clock,
                chance=random.Random(1),
                keys=desk.keys,
                changed=lambda: None,
                findings=Findings(),
                custom_ops=custom_ops,
                optimised=optimised,
                memory=memory,
                pacing=pacing(self.server) if pacing else None,
                cold=lambda _: cold,
                live=LiveModels(),
                limits=UpdateLimits(
                    models_max=models_max, rest_check_s=0.05, health_s=0.05, backoff=Backoff(base_s=0.05, cap_s=0.1)
                ),
            ),
            DEVICE,
        )

    async def stop(self) -> None:
        await self.executor.stop()
        await self.server.close()
        await self.session.close()
        self.journal.close()

    async def die(self) -> None:
        """End as a killed process does: nothing is said to the journal."""
        await asyncio.gather(*(lane.stop() for lane in self.executor._lanes.values()))
        await self.server.close()
        await self.session.close()
        self.journal.close()

    @property
    def model(self) -> ReportedModel | None:
        return next((entry for entry in self.executor.standing().models if entry.model == MODEL), None)

    async def finished(self, order: int) -> UpdateReport:
        """The report of the update that `order` began."""

        def over() -> UpdateReport | None:
            update = self.model.last_update if self.model else None
            return update if update and update.generation == order else None

        await eventually(over, f"order {order} is finished")
        update = over()
        assert update
        return update

    async def ask(self, token: int = 7) -> tuple[str, bool]:
        """The version that answered an input full of `token`, and whether the answer was finite."""
        feeds = {"bytes": np.full((1, 2048), token, np.int32)}
        answer = await self.server.infer(MODEL, None, feeds)
        return answer.version, bool(np.isfinite(answer.outputs["target_label"]).all())


@asynccontextmanager
async def device_at(
    folder: Path,
    desk: ReleaseDesk,
    free: Callable[[], int] = lambda: PLENTY,
    engine: Engine | None = None,
    stopwatch: Clock | None = None,
    clock: Clock | None = None,
    *,
    custom_ops: bool = False,
    optimised: OptimisedModels | None = None,
    memory: Memory | None = None,
    models_max: int = 0,
    cold: ColdStart = ColdStart(),  # noqa: B008 (frozen)
    pacing: Callable[[ModelServer], Pacing] | None = None,
) -> AsyncIterator[Device]:
    """A device that runs for the block. `engine` and `stopwatch` are the model server's; by default the real ones."""
    device = Device(
        folder,
        desk,
        free,
        engine,
        stopwatch,
        clock,
        custom_ops=custom_ops,
        optimised=optimised,
        memory=memory,
        models_max=models_max,
        cold=cold,
        pacing=pacing,
    )
    await device.executor.start()
    try:
        yield device
    finally:
        await device.stop()
