"""The device's line to its controller over MQTT: always trying, honest about not being there.

Each connection has its own epoch, a number that only grows. With CONNECT the broker gets the will ("epoch 7 is dead"),
then the birth ("epoch 7 lives"); so a death that arrives late, of a connection that was replaced long ago, is known as
such. `connected` is true once the birth is acknowledged and the subscriptions stand.

Publishing returns when the broker has the message and raises `Unavailable` otherwise: nothing is queued here while the
line is down, so memory stays bounded and whoever publishes says what is true when the line is back (state), or keeps it
on the disk (telemetry). Orders are handed over one at a time and only the newest one waits: each is complete in itself.
"""

import asyncio
import contextlib
import logging
import random
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from common.backoff import Backoff
from common.clock import Clock
from common.errors import FerryError, InvalidInput, Unavailable
from common.ids import DeviceId
from common.trust import ENVELOPE_BYTES_MAX
from common.wire import (
    Capabilities,
    Chunk,
    ChunkRequest,
    Heartbeat,
    Message,
    Presence,
    ReportedState,
    Telemetry,
    decode,
    encode,
)
from common.wire.messages import Sequenced
from common.wire.topics import Kind, Topic, filters_for_device
from edge_agent.broker.connection import Connection, Endpoint, Outgoing, parse_broker_url
from edge_agent.identity import Identity

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Sequenced)

BIRTH_SEQ = 1
DEATH_SEQ = 2
"""The will is composed before anything else of its epoch, so both numbers are fixed."""

STABLE_S = 10.0
"""A connection that ended sooner counts as a failure for the waiting time before the next."""

_KINDS: dict[type[Message], Kind] = {
    Presence: Kind.STATE,
    Heartbeat: Kind.HEARTBEAT,
    Telemetry: Kind.TELEMETRY,
    ReportedState: Kind.REPORTED,
    ChunkRequest: Kind.CHUNK_REQUEST,
}
_AT_MOST_ONCE = frozenset({Kind.CHUNK_REQUEST, Kind.CHUNK})
"""A lost chunk is asked for again, so the broker need not keep any."""


class LinkLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait for the broker, and how much may be under way."""

    acknowledge_s: float = 15.0
    """A broker that has not acknowledged a message by then is taken for lost, and the connection is made anew."""
    in_flight_max: int = 16
    backoff: Backoff = Backoff()


class AgentLink:
    """The MQTT side of one device."""

    def __init__(
        self,
        identity: Identity,
        *,
        on_desired: Callable[[bytes], Awaitable[None]],
        epoch_source: Callable[[], int],
        capabilities: Callable[[], Capabilities],
        clock: Clock,
        on_connection: Callable[[bool], object] | None = None,
        tls: ssl.SSLContext | None = None,
        limits: LinkLimits | None = None,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        """`epoch_source` gives a number greater than all before it, durably; `on_connection` hears of every change of
        `connected`; `on_desired` gets signed envelopes, not verified yet. All are called on the event loop.
        """
        self._endpoint = _endpoint(identity, tls)
        self._device = identity.device
        self._on_desired = on_desired
        self._epoch_source = epoch_source
        self._capabilities = capabilities
        self._clock = clock
        self._on_connection = on_connection or _ignore
        self._limits = limits or LinkLimits()
        self._uniform = uniform
        self._in_flight = asyncio.Semaphore(self._limits.in_flight_max)
        self._chunk_listener: Callable[[Chunk], None] | None = None
        self._orders: asyncio.Queue[bytes] = asyncio.Queue()
        self._connection: Connection | None = None
        self._epoch = 0
        self._epoch_spent = False
        self._sent: Counter[type[Sequenced]] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self.last_error: FerryError | None = None

    @property
    def device(self) -> DeviceId:
        """Who we are."""
        return self._device

    @property
    def connected(self) -> bool:
        """Whether the broker has our birth and we hear orders."""
        return self._connection is not None

    @property
    def ended(self) -> tuple[str, ...]:
        """The loops that have ended; there should be none between `start` and `stop`."""
        return tuple(f"loop of {task.get_name()}" for task in self._tasks if task.done())

    async def start(self) -> None:
        """Begin to connect, and go on for ever. Returns at once; `connected` becomes true when it is."""
        self._begin_epoch()
        loops = (self._stay_connected, self._hand_over_orders)
        self._tasks = [asyncio.create_task(loop(), name=f"link.{loop.__name__.strip('_')}") for loop in loops]

    async def stop(self) -> None:
        """Say that this device goes offline, if anybody listens, and hang up."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(Unavailable):  # then the will says it
                await self._acknowledged(connection, self._presence(DEATH_SEQ, online=False))
            await connection.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def stamp(self, message: S) -> S:
        """`message` with its place in this device's history: epoch, next number of its kind, time of sending."""
        self._sent[type(message)] += 1
        place = {"epoch": self._epoch, "seq": self._sent[type(message)], "sent_at": self._clock.now()}
        return msgspec.structs.replace(message, **place)

    async def publish(self, message: Heartbeat | Telemetry | ReportedState) -> None:
        """Stamp and send; returns when the broker has it, else `Unavailable`."""
        connection = self._connection
        if connection is None:
            raise Unavailable("not connected to the broker")
        await self._acknowledged(connection, self.stamp(message))

    def listen_chunks(self, listener: Callable[[Chunk], None]) -> None:
        """Call `listener` on the event loop with every chunk that comes."""
        self._chunk_listener = listener

    async def request_chunk(self, request: ChunkRequest) -> None:
        """Send a request for a chunk, at most once; `Unavailable` when there is no connection."""
        if self._connection is None:
            raise Unavailable("not connected to the broker")
        await self._connection.publish(_outgoing(request))

    async def _stay_connected(self) -> None:
        failures = 0
        while True:
            began = self._clock.monotonic()
            try:
                await self._connect_once()
            except FerryError as error:
                self._tell_failure(error)
            # A broker that takes us in and drops us at once must not be hammered either.
            failures = failures + 1 if self._clock.monotonic() - began < STABLE_S else 0
            await asyncio.sleep(self._limits.backoff.delay_s(failures, self._uniform()))

    async def _connect_once(self) -> None:
        """One connection, from its epoch to its end. Raises when it did not come about."""
        if self._epoch_spent:
            self._begin_epoch()
        connection = Connection(self._endpoint, _outgoing(self._presence(DEATH_SEQ, online=False)), self._take)
        try:
            await self._announce(connection)
            await self._while_connected(connection)
        finally:
            # An epoch that no broker can have seen is used again, to spare the disk while the line is down for long.
            self._epoch_spent = connection.announced
            await connection.abort()

    async def _announce(self, connection: Connection) -> None:
        await connection.open()
        filters = [
            (name, int(Topic.parse(name).kind not in _AT_MOST_ONCE)) for name in filters_for_device(self._device)
        ]
        try:
            async with asyncio.timeout(self._limits.acknowledge_s):
                await connection.subscribe(filters)
        except TimeoutError as error:
            raise Unavailable("the broker does not answer a subscription") from error
        await self._acknowledged(connection, self._presence(BIRTH_SEQ, online=True))

    async def _while_connected(self, connection: Connection) -> None:
        self._connection, self.last_error = connection, None
        logger.info("connected to the broker", extra={"epoch": self._epoch})
        self._on_connection(True)
        try:
            await asyncio.shield(connection.lost)
        finally:
            self._connection = None
            logger.info("the connection to the broker ended", extra={"epoch": self._epoch})
            self._on_connection(False)

    async def _acknowledged(self, connection: Connection, message: Message) -> None:
        try:
            async with self._in_flight, asyncio.timeout(self._limits.acknowledge_s):
                await connection.publish(_outgoing(message))
        except TimeoutError as error:
            await connection.abort()
            raise Unavailable(f"the broker did not acknowledge a {type(message).__name__}") from error

    async def _hand_over_orders(self) -> None:
        while True:
            envelope = await self._orders.get()
            try:
                await self._on_desired(envelope)
            except FerryError as error:
                logger.warning("an order was refused: %s", error)

    def _take(self, topic: str, payload: bytes) -> None:
        """What comes in, if it is ours and well-formed; the rest is dropped."""
        try:
            parsed = Topic.parse(topic)
            if parsed == Topic(self._device, Kind.DESIRED):
                self._take_order(payload)
            elif parsed == Topic(self._device, Kind.CHUNK) and self._chunk_listener is not None:
                self._chunk_listener(decode(payload, Chunk))
        except InvalidInput as error:
            logger.warning("dropped a message: %s", error, extra={"topic": topic[:120]})

    def _take_order(self, payload: bytes) -> None:
        if len(payload) > ENVELOPE_BYTES_MAX:
            raise InvalidInput(f"{len(payload)} bytes", field="order", fix=f"at most {ENVELOPE_BYTES_MAX} bytes")
        if not payload:
            return  # how a retained message is cleared; an empty order would be a signed one
        while not self._orders.empty():
            self._orders.get_nowait()
        self._orders.put_nowait(payload)

    def _begin_epoch(self) -> None:
        self._epoch = self._epoch_source()
        self._epoch_spent = False
        self._sent.clear()

    def _presence(self, seq: int, *, online: bool) -> Presence:
        return Presence(
            device=self._device,
            epoch=self._epoch,
            seq=seq,
            sent_at=self._clock.now(),
            online=online,
            capabilities=self._capabilities() if online else None,
        )

    def _tell_failure(self, error: FerryError) -> None:
        level = logging.DEBUG if str(error) == str(self.last_error) else logging.WARNING
        logger.log(level, "no line to the broker: %s", error)
        self.last_error = error


def _endpoint(identity: Identity, tls: ssl.SSLContext | None) -> Endpoint:
    access = identity.broker
    host, port, encrypted = parse_broker_url(access.url)
    context = (tls or ssl.create_default_context()) if encrypted else None
    return Endpoint(
        host=host,
        port=port,
        username=access.username,
        password=access.password,
        client_id=identity.client_id,
        tls=context,
    )


def _outgoing(message: Message) -> Outgoing:
    topic = Topic(message.device, _KINDS[type(message)])
    qos = 0 if topic.kind in _AT_MOST_ONCE else 1
    return Outgoing(topic=str(topic), payload=encode(message), qos=qos, retain=topic.retained)


def _ignore(_connected: bool) -> None:
    pass
