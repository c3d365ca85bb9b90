"""One MQTT 3.1.1 connection, from CONNECT to its end, as asyncio sees it. It never reconnects.

A thin shell over paho-mqtt, driven by the running event loop: paho has no thread here, only name look-up and the TCP
and TLS handshakes happen in one. A publication is over when the broker has acknowledged it or when the connection
ends, whichever comes first; nothing is queued for a later connection, because whoever publishes knows better what is
still worth sending then.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from common.errors import FerryError, InvalidInput, Unauthenticated, Unavailable

CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
KEEPALIVE_S = 30
"""We ask for a sign of life after this long without one, and give up after twice that."""
HOUSEKEEPING_S = 1.0
BAD_CREDENTIAL = frozenset({"Bad user name or password", "Not authorized"})

OnMessage = Callable[[str, bytes], None]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where to connect and as whom; `tls` is None for a plain connection."""

    host: str
    port: int
    username: str
    password: str
    client_id: str
    tls: ssl.SSLContext | None = None


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A message to publish, or to leave with the broker as the will."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


def parse_broker_url(url: str) -> tuple[str, int, bool]:
    """(host, port, TLS?) of `mqtt://host:port` or `mqtts://host:port`, or `InvalidInput`."""
    fix = "write mqtt://HOST:PORT or mqtts://HOST:PORT"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInput(f"{url[:120]!r}: {error}", field="broker", fix=fix) from error
    if parts.scheme not in {"mqtt", "mqtts"} or not host or not port or parts.username is not None:
        raise InvalidInput(f"{url[:120]!r} is no broker address", field="broker", fix=fix)
    return host, port, parts.scheme == "mqtts"


class Connection:
    """One connection. `lost` is done when it has ended, however it ended.

    `announced` tells whether the broker may have seen our CONNECT, and so may hold our will.
    """

    def __init__(self, endpoint: Endpoint, will: Outgoing | None, on_message: OnMessage) -> None:
        self._loop = asyncio.get_running_loop()
        self._endpoint = endpoint
        self._on_message = on_message
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._unacknowledged: dict[int, asyncio.Future[Sequence[ReasonCode]]] = {}
        self._housekeeping: asyncio.Task[None] | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.announced = False
        self._client = self._make_client(will)

    async def open(self) -> None:
        """Connect. Raises `Unavailable`, or `Unauthenticated` when the broker does not let this device in."""
        host, port = self._endpoint.host, self._endpoint.port
        try:
            await asyncio.to_thread(self._client.connect, host, port, KEEPALIVE_S)
        except (OSError, ValueError) as error:
            fix = "check that it runs and that the address is right"
            raise Unavailable(f"no connection to the broker at {host}:{port}: {error}", fix=fix) from error
        self.announced = True
        if (open_socket := self._client.socket()) is not None:
            self._loop.add_reader(open_socket, self._read)
        self._housekeeping = asyncio.create_task(self._keep_house())
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.shield(self._accepted)
        except TimeoutError as error:
            raise Unavailable(f"the broker at {host}:{port} does not answer", fix="check that it is one") from error

    async def subscribe(self, filters: Sequence[tuple[str, int]]) -> None:
        """Subscribe to (filter, QoS) pairs; `Unavailable` when the broker refuses one."""
        _, message_id = self._client.subscribe(list(filters))
        for (name, _), reason in zip(filters, await self._acknowledgement(message_id), strict=False):
            if reason.is_failure:
                raise Unavailable(f"the broker refused the subscription to {name}: {reason}")

    async def publish(self, message: Outgoing) -> None:
        """Send; at QoS 1 return when the broker has acknowledged it. `Unavailable` when the connection ends before."""
        info = self._client.publish(message.topic, message.payload, message.qos, message.retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise Unavailable("not connected to the broker")
        if message.qos:
            await self._acknowledgement(info.mid)

    async def close(self) -> None:
        """Say goodbye (the broker then forgets the will), or just hang up where that takes too long."""
        if not self.lost.done():
            self._client.disconnect()
            await asyncio.wait({self.lost}, timeout=CLOSE_TIMEOUT_S)
        await self.abort()

    async def abort(self) -> None:
        """Hang up, as a broken network would: the broker publishes the will."""
        if not self.lost.done() and isinstance(open_socket := self._client.socket(), socket.socket):
            with contextlib.suppress(OSError):  # it was not connected any more
                # The plain shutdown, also for TLS: a goodbye could wait for a peer that is gone.
                socket.socket.shutdown(open_socket, socket.SHUT_RDWR)
            await asyncio.wait({self.lost}, timeout=CLOSE_TIMEOUT_S)
        self._end(Unavailable("the connection to the broker was closed"))

    async def _acknowledgement(self, message_id: int | None) -> Sequence[ReasonCode]:
        if message_id is None or self.lost.done():
            raise Unavailable("not connected to the broker")
        future: asyncio.Future[Sequence[ReasonCode]] = self._loop.create_future()
        self._unacknowledged[message_id] = future
        try:
            return await future
        finally:
            self._unacknowledged.pop(message_id, None)

    def _acknowledge(self, message_id: int, reasons: Sequence[ReasonCode]) -> None:
        future = self._unacknowledged.get(message_id)
        if future is not None and not future.done():
            future.set_result(reasons)

    def _end(self, error: FerryError) -> None:
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        for waiting in self._unacknowledged.values():
            if not waiting.done():
                waiting.set_exception(error)
        if not self._accepted.done():
            self._accepted.set_exception(error)
            self._accepted.exception()  # an error that nobody waits for is no news
        if not self.lost.done():
            self.lost.set_result(None)

    def _make_client(self, will: Outgoing | None) -> paho.Client:
        endpoint = self._endpoint
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            endpoint.client_id,
            clean_session=True,  # orders are retained and chunks are asked for: there is nothing to keep for us
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.username_pw_set(endpoint.username, endpoint.password)
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        if endpoint.tls is not None:
            client.tls_set_context(endpoint.tls)
        client.on_connect = self._connack
        client.on_disconnect = self._disconnected
        client.on_message = lambda _client, _data, message: self._on_message(message.topic, bytes(message.payload))
        client.on_publish = lambda _client, _data, message_id, *_: self._acknowledge(message_id, ())
        client.on_subscribe = lambda _client, _data, message_id, reasons, _properties: self._acknowledge(
            message_id, reasons
        )
        client.on_socket_register_write = self._want_to_write
        client.on_socket_unregister_write = self._stop_writing
        client.on_socket_close = self._forget_socket
        return client

    def _connack(self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if self._accepted.done():
            return
        if not reason.is_failure:
            self._accepted.set_result(None)
        elif reason.getName() in BAD_CREDENTIAL:
            fix = "join again with `ferry-agent join --force` if this goes on"
            self._accepted.set_exception(Unauthenticated(f"the broker refused this device: {reason}", fix=fix))
        else:
            self._accepted.set_exception(Unavailable(f"the broker refused the connection: {reason}"))

    def _disconnected(self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _props: Any) -> None:
        self._end(Unavailable(f"the connection to the broker ended: {reason}"))

    async def _keep_house(self) -> None:
        """Let paho send and miss its keep-alives."""
        while not self.lost.done():
            self._client.loop_misc()
            await asyncio.wait({self.lost}, timeout=HOUSEKEEPING_S)

    def _read(self) -> None:
        self._client.loop_read()
        # What TLS has already decrypted no longer makes the socket readable, so it is taken here.
        while isinstance(open_socket := self._client.socket(), ssl.SSLSocket) and open_socket.pending():
            self._client.loop_read()

    def _want_to_write(self, _client: paho.Client, _data: Any, _socket: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_writes)  # CONNECT is queued from the connecting thread

    def _stop_writing(self, _client: paho.Client, _data: Any, open_socket: Any) -> None:
        self._loop.remove_writer(open_socket)

    def _watch_writes(self) -> None:
        if (open_socket := self._client.socket()) is not None and self._client.want_write():
            self._loop.add_writer(open_socket, self._client.loop_write)

    def _forget_socket(self, _client: paho.Client, _data: Any, closing: Any) -> None:
        self._loop.remove_reader(closing)
        self._loop.remove_writer(closing)
