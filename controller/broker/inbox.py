"""Messages between their arrival and their acknowledgement.

Each message is handled by one of a few workers and acknowledged only after that, when what it says has been committed.
What handling may end in:

- Bad input (`InvalidInput`) can never work: it is logged, counted and acknowledged.
- Transient trouble (`Unavailable`, `StorageFull`) is tried again until it works; meanwhile the message stays
  unacknowledged and, once enough of them wait, the broker keeps the rest.
- Anything else is a mistake of ours: it is tried `ATTEMPTS_MAX` times, then logged and acknowledged, so that one
  message cannot block a fleet.

The inbox knows nothing of sockets: it says `acknowledge(packet)` and whether it is `full`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec
from opentelemetry.metrics import Meter, Observation

from common.backoff import Backoff
from common.errors import InvalidInput, StorageFull, Unavailable
from common.wire import Topic

WORKERS = 128
"""Messages handled at the same time, so that the store can commit many at once."""
ATTEMPTS_MAX = 3
RETRY = Backoff(base_s=0.1, cap_s=5.0)

OnMessage = Callable[[Topic, bytes], Awaitable[None]]

_log = logging.getLogger(__name__)


class Packet(msgspec.Struct, frozen=True):
    """A message as it came, and the connection it came by: packet ids mean nothing on another one."""

    topic: str
    payload: bytes
    qos: int
    id: int
    connection: int


class Inbox:
    """See the module. All methods belong to the event loop."""

    def __init__(
        self,
        on_message: OnMessage,
        acknowledge: Callable[[Packet], None],
        *,
        waiting_max: int,
        uniform: Callable[[], float],
        meter: Meter,
    ) -> None:
        self._on_message = on_message
        self._acknowledge = acknowledge
        self._waiting_max = waiting_max
        self._uniform = uniform
        self._waiting: deque[Packet] = deque()
        self._arrived = asyncio.Semaphore(0)
        self._received = meter.create_counter("ferry.broker.messages.received", description="Messages taken in")
        self._refused = meter.create_counter("ferry.broker.messages.refused", description="Messages of no use")
        meter.create_observable_gauge(
            "ferry.broker.messages.waiting",
            callbacks=[lambda _: [Observation(len(self._waiting))]],
            description="Messages received and not handled yet",
        )

    @property
    def full(self) -> bool:
        """Whether no more should come in for now."""
        return len(self._waiting) >= self._waiting_max

    @property
    def roomy(self) -> bool:
        """Whether more may come in again: at most half full, so that reading does not flicker."""
        return len(self._waiting) <= self._waiting_max // 2

    def put(self, packet: Packet) -> None:
        """Take a message in; never blocks and never refuses."""
        self._waiting.append(packet)
        self._arrived.release()

    async def work(self) -> None:
        """Handle messages, one at a time, until cancelled."""
        while True:
            await self._arrived.acquire()
            packet = self._waiting.popleft()
            await self._handle(packet)
            self._acknowledge(packet)

    async def _handle(self, packet: Packet) -> None:
        """Have the message handled, in the end one way or another."""
        attempt = 0
        while not await self._attempt(packet, attempt):
            await asyncio.sleep(RETRY.delay_s(attempt, self._uniform()))
            attempt += 1

    async def _attempt(self, packet: Packet, attempt: int) -> bool:
        """Whether the message is done with."""
        where = {"topic": packet.topic, "attempt": attempt}
        try:
            topic = Topic.parse(packet.topic)
            await self._on_message(topic, packet.payload)
        except InvalidInput as error:
            _log.warning("refused a message: %s", error, extra=where)
            self._refused.add(1, {"reason": error.code})
            return True
        except (Unavailable, StorageFull) as error:
            _log.warning("cannot take a message yet: %s", error, extra=where)
            return False
        except Exception:  # noqa: BLE001  whatever it was, one message must not block a fleet
            _log.exception("failed on a message", extra=where)
            if attempt + 1 < ATTEMPTS_MAX:
                return False
            self._refused.add(1, {"reason": "error"})
            return True
        self._received.add(1, {"kind": topic.kind.value})
        return True
