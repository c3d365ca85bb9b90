"""One device for the crash stories: the agent's own executor, journal, slots, fetcher and engine on a folder."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.backoff import Backoff
from common.clock import SystemClock
from common.errors import FerryError
from edge_agent.executor import Executor, Parts, Standing, UpdateLimits
from edge_agent.fetch import FetchLimits, Session, make_fetcher
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.memory import Memory
from edge_agent.inference.placement import BeingReplaced
from edge_agent.inference.serving import ModelServer
from edge_agent.journal import FILE_NAME, Journal
from edge_agent.slots import Slots
from edge_agent.telemetry.recorder import Recorder
from edge_agent.telemetry.usage import Findings
from edge_agent.update import ModelState
from tests.integration.release_desk import DEVICE, MODEL, ReleaseDesk
from tests.integration.small_models import HeldEngine

QUESTION = 1.0
PATIENCE_S = 90.0


class Stuck(AssertionError):
    """What must happen did not."""


class Device:
    """`told` is called with everything that the device would report; `boot` is the machine's run. `room_bytes` is what
    there is of memory for a second release while one is loaded; None: as much as anybody wants.
    """

    def __init__(
        self,
        folder: Path,
        desk: ReleaseDesk,
        session: Session,
        told: Callable[[Standing], None],
        boot: int,
        room_bytes: int | None = None,
    ) -> None:
        clock = SystemClock()
        self.engine = HeldEngine()
        self.journal = Journal(folder / FILE_NAME)
        self.server = ModelServer(self.engine, Recorder(clock.now()), clock, workers=1)
        self.executor = Executor(
            Parts(
                journal=self.journal,
                slots=Slots(folder, reserve_bytes=0),
                fetcher=make_fetcher(desk.url, session, None, FetchLimits(), clock),
                server=self.server,
                clock=clock,
                chance=random.Random(1),
                keys=desk.keys,
                changed=lambda: told(self.executor.standing()),
                findings=Findings(),
                limits=UpdateLimits(health_s=0.005, probe_requests=25, backoff=Backoff(base_s=0.01, cap_s=0.02)),
                boot=boot,
                memory=Memory(self._available, lambda: None, reserve_bytes=0),
            ),
            DEVICE,
        )
        self._told = told
        self._room_bytes = room_bytes

    def _available(self) -> int | None:
        return self._room_bytes if self.server.in_memory() else None

    async def start(self) -> None:
        """As the program does it: what stands is told at once."""
        await self.executor.start()
        self._told(self.executor.standing())

    async def stop(self, *, clean: bool) -> None:
        """In good order, or as a process ends that is killed: nothing is said to the journal."""
        if clean:
            await self.executor.stop()
        else:
            await asyncio.gather(*(lane.stop() for lane in self.executor._lanes.values()))
        await self.server.close()
        self.journal.close()

    @property
    def state(self) -> ModelState:
        """The model's state in memory, which is the journal's."""
        lane = self.executor._lanes.get(MODEL)
        return lane.state if lane else ModelState(model=MODEL)

    async def ask(self) -> tuple[str, float] | None:
        """The version that answers, and the number that it adds to what it is asked; None: nothing is served.

        Raises `BeingReplaced` where memory holds one release and the next is being loaded.
        """
        try:
            answer = await self.server.infer(MODEL, None, {"x": np.full((1, 4), QUESTION, np.float32)})
        except FerryError as error:
            if error.code == "not_found":
                return None
            raise
        (number,) = set((answer.outputs["y"] - QUESTION).flat)
        return str(answer.version), float(number)

    async def ask_patiently(self) -> tuple[str, float] | None:
        """`ask` as a caller who comes back when told to, or when a release fails and nothing stands behind it; `Stuck`
        for one who does so in vain.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        while True:
            try:
                return await self.ask()
            except (BeingReplaced, EngineFailure) as error:
                if loop.time() > deadline:
                    raise Stuck("callers come back for ever") from error
                await asyncio.sleep(0.003)

    async def until(self, condition: Callable[["Device"], object], what: str) -> None:
        """Wait for it; `Stuck` when it does not come."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        while not condition(self):
            if loop.time() > deadline:
                raise Stuck(f"never {what}; it is {self.state.stage}: {self.state.trouble}")
            await asyncio.sleep(0.002)
