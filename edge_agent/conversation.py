"""What the agent and its controller tell each other, and when: four loops that never end.

- report: after every change, the newest state and no older one; over MQTT, over HTTP while MQTT is down.
- heartbeat: each `heartbeat_s` while MQTT is up.
- telemetry: each `telemetry_s` the windows are cut and spooled; they leave the spool when the broker has them.
- poll: each `poll_s`, and at once when MQTT comes or goes, for an order that MQTT did not bring: not every broker gives
  a retained order to a device that subscribes while it is being replaced. Almost every answer is 304.

Orders from MQTT and from polls go the same way. Trouble on the way is waited for here and never stops the serving.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine

import msgspec
from msgspec import UNSET

from common.backoff import Backoff
from common.clock import Clock
from common.errors import FerryError
from common.ids import DeviceId
from common.wire import DeviceWindow, ReportedState, Telemetry, TelemetryWindow
from common.wire.codec import BYTES_MAX
from common.wire.messages import WINDOWS_PER_MESSAGE_MAX
from edge_agent.broker import AgentLink
from edge_agent.executor import Executor
from edge_agent.fetch import DesiredPoll, Envelope
from edge_agent.journal import Journal
from edge_agent.telemetry.recorder import Recorder
from edge_agent.telemetry.spool import Spool
from edge_agent.telemetry.usage import UsageMeter
from edge_agent.vitals import Vitals

logger = logging.getLogger(__name__)

NOT_MODIFIED = "not_modified"
"""The journal's name for the number of polls that were answered 304."""

POLL_SPREAD = 0.25
"""Polls come up to this share early or late, so that a fleet that started together does not ask together."""

WINDOWS_BYTES_MAX = BYTES_MAX[Telemetry] - 4096
"""Windows of one message together: the rest is for what is around them, their separators included."""

HERD_S = 2.0
"""When MQTT comes or goes, it does so for the whole fleet: the polls that this causes are spread over this time."""


class Rhythm(msgspec.Struct, frozen=True, kw_only=True):
    """How often, in seconds."""

    heartbeat_s: float
    telemetry_s: float
    poll_s: float
    retry: Backoff = Backoff(base_s=1.0, cap_s=30.0)


class Conversation:
    """The loops. `changed` says that there is something new to report, `line_changed` that MQTT came or went."""

    def __init__(
        self,
        device: DeviceId,
        *,
        link: AgentLink,
        poll: DesiredPoll,
        executor: Executor,
        journal: Journal,
        recorder: Recorder,
        spool: Spool,
        usage: UsageMeter,
        vitals: Vitals,
        clock: Clock,
        chance: random.Random,
        rhythm: Rhythm,
    ) -> None:
        self._device = device
        self._link = link
        self._poll = poll
        self._executor = executor
        self._journal = journal
        self._recorder = recorder
        self._spool = spool
        self._usage = usage
        self._vitals = vitals
        self._clock = clock
        self._chance = chance
        self._rhythm = rhythm
        self._news = asyncio.Event()
        self._ask_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin all four loops."""
        loops = (self._reports, self._heartbeats, self._telemetry, self._polls)
        self._tasks = [asyncio.create_task(_for_ever(loop), name=loop.__name__.strip("_")) for loop in loops]
        self._news.set()
        self._ask_now.set()

    async def stop(self) -> None:
        """End the loops and put the last telemetry on the disk."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await asyncio.to_thread(self._keep_windows)
        except FerryError as error:
            logger.warning("the last telemetry is lost: %s", error)

    @property
    def ended(self) -> tuple[str, ...]:
        """The loops that have ended; there should be none until `stop`."""
        return tuple(f"loop of {task.get_name()}" for task in self._tasks if task.done())

    def changed(self) -> None:
        """There is something new to report."""
        self._news.set()

    def line_changed(self, connected: bool) -> None:
        """MQTT came or went: ask over HTTP for what it may have missed. Coming: say what runs, try again what waits."""
        self._ask_now.set()
        if connected:
            self._news.set()
            self._executor.nudge()

    async def take_order(self, envelope: bytes) -> None:
        """An order came over MQTT."""
        await self._executor.accept(envelope)

    async def _reports(self) -> None:
        await self._news.wait()
        self._news.clear()
        attempt = 0
        while not await self._report():
            await asyncio.sleep(self._rhythm.retry.delay_s(attempt, self._chance.random()))
            attempt += 1
            self._news.clear()  # the next try says it all

    async def _report(self) -> bool:
        standing = self._executor.standing()
        state = ReportedState(
            device=self._device,
            epoch=0,
            seq=0,
            sent_at=0.0,
            generation=standing.generation,
            models=standing.models,
            held=standing.held,
            refused=standing.refused,
            traceparent=standing.traceparent,
        )
        try:
            if self._link.connected:
                await self._link.publish(state)
            else:
                await self._poll.report(self._link.stamp(state))
        except FerryError as error:
            logger.debug("could not report: %s", error)
            return False
        return True

    async def _heartbeats(self) -> None:
        if self._link.connected:
            standing = self._executor.standing()
            not_modified = await asyncio.to_thread(self._journal.number, NOT_MODIFIED)
            heartbeat = self._vitals.heartbeat(self._device, standing.generation, standing.running, not_modified)
            try:
                await self._link.publish(heartbeat)
            except FerryError as error:
                logger.debug("could not send a heartbeat: %s", error)
        await asyncio.sleep(self._rhythm.heartbeat_s)

    async def _telemetry(self) -> None:
        await asyncio.sleep(self._rhythm.telemetry_s)
        try:
            await asyncio.to_thread(self._keep_windows)
            while self._link.connected and await self._send_windows():
                pass
        except FerryError as error:
            logger.debug("telemetry stays on the disk: %s", error)

    def _keep_windows(self) -> None:
        now = self._clock.now()
        self._spool.add([*self._recorder.cut(now), self._usage.cut(now, self._spool.lost)])

    async def _send_windows(self) -> bool:
        """One message of the oldest windows; whether there may be more."""
        spooled = await asyncio.to_thread(self._spool.peek, WINDOWS_PER_MESSAGE_MAX, WINDOWS_BYTES_MAX)
        if not spooled:
            return False
        windows = [entry.window for entry in spooled]
        message = Telemetry(
            device=self._device,
            epoch=0,
            seq=0,
            sent_at=0.0,
            windows=tuple(window for window in windows if isinstance(window, TelemetryWindow)),
            device_windows=tuple(window for window in windows if isinstance(window, DeviceWindow)) or UNSET,
        )
        await self._link.publish(message)
        await asyncio.to_thread(self._spool.drop, [entry.id for entry in spooled])
        return len(self._spool) > 0

    async def _polls(self) -> None:
        spread = 1 + POLL_SPREAD * (2 * self._chance.random() - 1)
        try:
            async with asyncio.timeout(self._rhythm.poll_s * spread):
                await self._ask_now.wait()
                await asyncio.sleep(HERD_S * self._chance.random())
        except TimeoutError:
            pass
        self._ask_now.clear()
        try:
            answer = await self._poll.poll(self._executor.etag)
        except FerryError as error:
            logger.info("no answer to a poll for orders: %s", error)
            return
        if isinstance(answer, Envelope):
            await self._executor.accept(answer.data)
        else:
            await asyncio.to_thread(self._journal.count, NOT_MODIFIED)
        self._executor.look_again()


async def _for_ever(turn: Callable[[], Coroutine[None, None, None]]) -> None:
    """One turn after another. A turn that breaks is our fault; the device must go on, but not spin."""
    while True:
        try:
            await turn()
        except Exception:  # logged with its trace: the one place where a loop's bug may end
            logger.exception("a loop of the agent broke and goes on", extra={"loop": getattr(turn, "__name__", "")})
            await asyncio.sleep(1.0)
