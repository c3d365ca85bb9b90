"""Who feeds the service manager's watchdog, and when it is left to bark: a hung agent is restarted, a slow one is not.

The agent is healthy while

- its event loop turns: what feeds is a task of that loop, so a loop that is stuck feeds nobody;
- the loops that must never end have not ended (the updates' lanes, the broker's link, reports, polls, telemetry);
- its pulses beat: a piece of work that does nothing is put through the inference threads, and a read through the
  journal, and comes out again.

A pulse that waits its turn is no sign of a hang: behind slow models it waits as every request does. So it is given up
only when neither it nor any request has come through for `stall_s`, which is far longer than any single inference or
write should take. Loads, builds and downloads are in nobody's way here and may take as long as they need. The start
may too: while the loop turns, it asks the manager for more time, up to `START_S_MAX`.

A watchdog does not mend: it stops feeding and says why, and the manager kills and starts again.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

from common.clock import Clock
from edge_agent.supervisor import Supervisor

logger = logging.getLogger(__name__)

FEEDS_PER_PERIOD = 2
"""As sd_watchdog_enabled(3) recommends."""
UNWATCHED_PERIOD_S = 60.0
"""Under a manager that does not watch, the sentence about us is still kept up to date."""
STATUS_CHARS_MAX = 300

START_S_MAX = 3600.0
"""For verifying and loading everything that is installed. A start that takes longer is taken for hung."""
START_EXTENSION_S = 60.0
START_EXTENDED_EACH_S = 15.0


class Pulse(NamedTuple):
    """Work that shows that a part is alive.

    `beat` returns when the work has gone through the part; `progress` is a number that changes whenever anything else
    has. The part is hung when neither happens for `stall_s` seconds.
    """

    name: str
    beat: Callable[[], Awaitable[object]]
    progress: Callable[[], int]
    stall_s: float


class Watched(NamedTuple):
    """What the watchdog looks at: the pulses, which endless loops have `ended`, and the `sentence` for people."""

    pulses: Sequence[Pulse]
    ended: Callable[[], Sequence[str]]
    sentence: Callable[[], str]


class Watchdog:
    """Feeds `supervisor` while what is `watched` is healthy."""

    def __init__(self, supervisor: Supervisor, watched: Watched, clock: Clock) -> None:
        self._supervisor = supervisor
        self._watched = watched
        self._clock = clock
        self._veins = [_Vein(pulse, clock) for pulse in watched.pulses]
        self._interval_s = (supervisor.watchdog_s or UNWATCHED_PERIOD_S) / FEEDS_PER_PERIOD
        self._trouble = ""

    async def watch(self) -> None:
        """Feed until cancelled; returns at once when there is nobody to feed."""
        if not self._supervisor.listens:
            return
        async with asyncio.TaskGroup() as beating:
            for vein in self._veins:
                beating.create_task(vein.beat_on(self._interval_s))
            while True:
                self._look()
                await asyncio.sleep(self._interval_s)

    def trouble(self) -> str:
        """Why the agent is not healthy, or nothing."""
        ended = [f"{name} has ended" for name in self._watched.ended()]
        stuck = [vein.trouble() for vein in self._veins]
        return "; ".join(filter(None, (*ended, *stuck)))

    def _look(self) -> None:
        trouble, before = self.trouble(), self._trouble
        self._trouble = trouble
        if trouble:
            if trouble != before:
                logger.error("not healthy, the watchdog is not fed: %s", trouble)
            self._supervisor.tell(status(f"hung: {trouble}"))
            return
        feed = ("WATCHDOG=1",) if self._supervisor.watchdog_s else ()
        self._supervisor.tell(*feed, status(self._watched.sentence()))


class _Vein:
    """One pulse, and when it was last felt."""

    def __init__(self, pulse: Pulse, clock: Clock) -> None:
        self._pulse = pulse
        self._clock = clock
        self._felt_at = clock.monotonic()
        self._progress = pulse.progress()

    async def beat_on(self, interval_s: float) -> None:
        while True:
            try:
                await self._pulse.beat()
            except Exception as error:  # noqa: BLE001 (a part that answers with an error has answered)
                logger.debug("%s answered with an error: %s", self._pulse.name, error)
            self._felt_at = self._clock.monotonic()
            await asyncio.sleep(interval_s)

    def trouble(self) -> str:
        now, progress = self._clock.monotonic(), self._pulse.progress()
        if progress != self._progress:
            self._progress, self._felt_at = progress, now
        silent_s = now - self._felt_at
        return f"{self._pulse.name} silent for {silent_s:.0f} s" if silent_s > self._pulse.stall_s else ""


@contextlib.asynccontextmanager
async def starting(supervisor: Supervisor) -> AsyncIterator[None]:
    """For the time of the block, ask the manager for more time as long as the loop turns."""

    async def extend() -> None:
        for _ in range(int(START_S_MAX / START_EXTENDED_EACH_S)):
            supervisor.tell(f"EXTEND_TIMEOUT_USEC={int(START_EXTENSION_S * 1e6)}")
            await asyncio.sleep(START_EXTENDED_EACH_S)

    extending = asyncio.create_task(extend())
    try:
        yield
    finally:
        extending.cancel()


def status(sentence: str) -> str:
    """The assignment that `systemctl status` shows."""
    return f"STATUS={' '.join(sentence.split())[:STATUS_CHARS_MAX]}"
