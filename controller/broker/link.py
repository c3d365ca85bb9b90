"""The controller's connection to the broker: one MQTT 3.1.1 session that outlives connections and the controller.

Incoming messages are handed to `on_message` and acknowledged only after it has returned, that is, after the store has
committed: a controller that is killed in between gets the message again (see `inbox` for what else can happen to one).
The session is persistent (a fixed client id, no clean session), so what devices send while the controller is away
waits at the broker. Messages may therefore come twice, and messages of one device may overtake each other;
`(epoch, seq)` sorts that out. When too many wait, the socket is not read until half of them are done.

`publish` returns when the broker has taken the message (PUBACK; for QoS 0, when it has left for the socket).
`on_message` must not wait for a `publish` with QoS 1: its acknowledgement comes through the same socket.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as mqtt
from opentelemetry.metrics import Meter, NoOpMeter
from paho.mqtt.enums import CallbackAPIVersion

from common.backoff import Backoff
from common.errors import FerryError, Unavailable
from common.wire import Topic, filters_for_controller
from controller.broker.endpoint import BrokerEndpoint
from controller.broker.inbox import WORKERS, Inbox, OnMessage, Packet
from controller.broker.pump import SocketPump

KEEPALIVE_S = 30
ANSWER_TIMEOUT_S = 10.0
TCP_TIMEOUT_S = 5.0
PUBLISH_TIMEOUT_S = 15.0
WAITING_MAX = 4096
INFLIGHT_MAX = 1000
"""Messages of ours that the broker has not acknowledged yet; more wait inside the client."""
RECONNECT = Backoff(base_s=0.5, cap_s=30.0)
SUBACK_FAILURE = 0x80

_log = logging.getLogger(__name__)


class BrokerLink:
    """See the module. All methods belong to the event loop that ran `start`."""

    def __init__(
        self,
        url: str,
        username: str,
        password: str,
        client_id: str,
        on_message: OnMessage,
        *,
        on_up: Callable[[bool], object] = lambda new_session: None,
        on_down: Callable[[], object] = lambda: None,
        meter: Meter | None = None,
        publish_timeout_s: float = PUBLISH_TIMEOUT_S,
        waiting_max: int = WAITING_MAX,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        """`on_up(new_session)` is called on each connection, `on_down()` when it is lost.

        A new session means that the broker remembers nothing of us, so what it retained may be gone as well.
        """
        meter = meter or NoOpMeter("broker")
        self._endpoint = BrokerEndpoint.parse(url)
        self._on_up = on_up
        self._on_down = on_down
        self._publish_timeout_s = publish_timeout_s
        self._uniform = uniform
        self._client = self._make_client(client_id, username, password)
        self._inbox = Inbox(on_message, self._acknowledge, waiting_max=waiting_max, uniform=uniform, meter=meter)
        self._published = meter.create_counter(
            "ferry.broker.messages.published", description="Messages the broker took"
        )
        self._pump: SocketPump | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sent: dict[int, asyncio.Future[None]] = {}
        self._answered: asyncio.Future[bool] | None = None
        self._lost = asyncio.Event()
        self._up = asyncio.Event()
        self._connection = 0

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and our subscriptions."""
        return self._up.is_set()

    async def wait_connected(self) -> None:
        """Return as soon as `connected` holds."""
        await self._up.wait()

    async def start(self) -> None:
        """Begin to connect, for as long as it takes; returns at once, with or without a broker."""
        self._pump = SocketPump(self._client)
        self._tasks = [
            asyncio.create_task(self._stay_connected(self._pump), name="broker-link"),
            asyncio.create_task(self._pump.keep_alive(), name="broker-link-pings"),
            *(asyncio.create_task(self._inbox.work(), name=f"broker-inbox-{number}") for number in range(WORKERS)),
        ]

    async def stop(self) -> None:
        """Say goodbye. What was not acknowledged comes again next time."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pump is not None:
            self._client.disconnect()
            self._pump.flush()
            self._pump.abort()

    async def publish(self, topic: Topic, payload: bytes) -> None:
        """Give the message to the broker, retained as its kind demands.

        Raises `Unavailable` when there is no connection or no acknowledgement in time; the broker may have it all the
        same, so publish it again.
        """
        if not self.connected:
            raise Unavailable("not connected to the broker", fix="the link comes back by itself; see the log for why")
        info = self._client.publish(str(topic), payload, qos=topic.qos, retain=topic.retained)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sent[info.mid] = future
        try:
            async with asyncio.timeout(self._publish_timeout_s):
                await future
        except TimeoutError as error:
            raise Unavailable(f"the broker did not acknowledge within {self._publish_timeout_s:.0f} s") from error
        finally:
            self._sent.pop(info.mid, None)
        self._published.add(1, {"kind": topic.kind.value})

    async def _stay_connected(self, pump: SocketPump) -> None:
        attempt = 0
        where = {"broker": self._endpoint.url}
        while True:
            try:
                new_session = await self._connect(pump)
            except Unavailable as error:
                _log.warning("no broker: %s", error, extra=where)
                attempt += 1
            else:
                attempt = 0
                self._up.set()
                _log.info("connected to the broker", extra={**where, "new_session": new_session})
                self._on_up(new_session)
                await self._lost.wait()
                self._on_down()
                _log.warning("lost the broker", extra=where)
            await asyncio.sleep(RECONNECT.delay_s(attempt, self._uniform()))

    async def _connect(self, pump: SocketPump) -> bool:
        """Connect and subscribe; whether the broker began a new session for us."""
        self._lost.clear()
        connected = self._ask()
        await pump.connect()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                new_session = await connected
                subscribed = self._ask()
                self._client.subscribe([(topic_filter, 1) for topic_filter in filters_for_controller()])
                await subscribed
        except TimeoutError as error:
            pump.abort()
            raise Unavailable("the broker did not answer") from error
        except Unavailable:
            pump.abort()
            raise
        return new_session

    def _ask(self) -> asyncio.Future[bool]:
        self._answered = asyncio.get_running_loop().create_future()
        return self._answered

    def _answer(self, answer: bool | FerryError) -> None:
        if self._answered is None or self._answered.done():
            return
        if isinstance(answer, FerryError):
            self._answered.set_exception(answer)
        else:
            self._answered.set_result(answer)

    def _acknowledge(self, packet: Packet) -> None:
        if packet.qos and packet.connection == self._connection:
            self._client.ack(packet.id, packet.qos)
        if self._pump is not None and self._inbox.roomy:
            self._pump.resume_reading()

    # What paho tells us, on the loop's thread

    def _on_connect(self, _c: Any, _u: Any, flags: mqtt.ConnectFlags, reason: Any, _p: Any) -> None:
        if reason.is_failure:
            fix = "check the user name and the password" if "uthoriz" in str(reason) else None
            self._answer(Unavailable(f"the broker refused us: {reason}", fix=fix))
        else:
            self._answer(not flags.session_present)

    def _on_subscribe(self, _c: Any, _u: Any, _mid: int, reasons: list[Any], _p: Any) -> None:
        if any(reason.value >= SUBACK_FAILURE for reason in reasons):
            fix = "allow this user to subscribe to " + ", ".join(filters_for_controller())
            self._answer(Unavailable("the broker does not let us subscribe", fix=fix))
        else:
            self._answer(False)

    def _on_disconnect(self, _c: Any, _u: Any, _flags: Any, reason: Any, _p: Any) -> None:
        self._connection += 1
        self._up.clear()
        self._lost.set()
        self._answer(Unavailable(f"the connection broke: {reason}"))
        for future in self._sent.values():
            if not future.done():
                future.set_exception(Unavailable("the connection to the broker broke"))

    def _on_publish(self, _c: Any, _u: Any, mid: int, _reason: Any, _p: Any) -> None:
        future = self._sent.get(mid)
        if future is not None and not future.done():
            future.set_result(None)

    def _on_arrival(self, _c: Any, _u: Any, message: mqtt.MQTTMessage) -> None:
        packet = Packet(message.topic, bytes(message.payload), message.qos, message.mid, self._connection)
        self._inbox.put(packet)
        if self._pump is not None and self._inbox.full:
            self._pump.pause_reading()

    def _make_client(self, client_id: str, username: str, password: str) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=False, manual_ack=True, reconnect_on_failure=False
        )
        if username or self._endpoint.username:
            client.username_pw_set(username or self._endpoint.username, password or self._endpoint.password)
        if self._endpoint.tls:
            client.tls_set()
        client.max_inflight_messages_set(INFLIGHT_MAX)
        client.suppress_exceptions = False
        client.connect_timeout = TCP_TIMEOUT_S
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_arrival
        client.connect_async(self._endpoint.host, self._endpoint.port, keepalive=KEEPALIVE_S)
        return client
