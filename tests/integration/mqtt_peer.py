"""A plain MQTT client for tests: what a device, or somebody who means harm, could do with any library."""

import asyncio
import threading
import time
from types import TracebackType
from typing import Any, NamedTuple

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from tests.conftest import eventually


class Got(NamedTuple):
    topic: str
    payload: bytes
    retained: bool


class Peer:
    """A connected paho client with its own thread; `got` is what has arrived."""

    def __init__(
        self, port: int, username: str, password: str, client_id: str = "", will: tuple[str, bytes] | None = None
    ):
        self.got: list[Got] = []
        self.refusal = ""
        self.disconnects = 0
        self._suback = threading.Event()
        self.granted: list[bool] = []
        clean = not client_id
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=clean, reconnect_on_failure=False
        )
        self.client.username_pw_set(username, password)
        self.client.reconnect_delay_set(1, 1)
        if will:
            self.client.will_set(*will, qos=1, retain=True)
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_message = lambda _c, _u, m: self.got.append(Got(m.topic, bytes(m.payload), bool(m.retain)))
        self._port = port

    async def __aenter__(self) -> "Peer":
        await asyncio.to_thread(self.client.connect, "127.0.0.1", self._port)
        self.client.loop_start()
        await eventually(lambda: self.client.is_connected() or self.refusal, "an answer to CONNECT")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.client.disconnect()
        await asyncio.to_thread(self.client.loop_stop)

    async def subscribe(self, topic: str) -> bool:
        """Whether the broker granted it."""
        self._suback.clear()
        self.client.subscribe(topic, 1)
        assert await asyncio.to_thread(self._suback.wait, 10)
        return self.granted[-1]

    async def receive_retained(self, topic: str) -> bytes:
        """Subscribe until the retained message is there, and return it.

        The NATS server can miss a subscription in the moment in which it takes a retained message in; a device's next
        poll mends that, a test subscribes again.
        """
        deadline = time.monotonic() + 30
        while not self.payloads(topic):
            assert time.monotonic() < deadline, f"nothing is retained on {topic}"
            await self.subscribe(topic)
            await asyncio.sleep(0.2)
        return self.payloads(topic)[0]

    async def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Publish with QoS 1 and wait for the acknowledgement."""
        await asyncio.to_thread(self.client.publish(topic, payload, 1, retain).wait_for_publish, 10)

    async def vanish(self) -> None:
        """Break the connection without a goodbye, as a power cut does."""
        sock: Any = self.client.socket()
        await asyncio.to_thread(self.client.loop_stop)
        sock.close()

    def payloads(self, topic: str) -> list[bytes]:
        return [got.payload for got in self.got if got.topic == topic]

    def _on_connect(self, _c: Any, _u: Any, _flags: Any, reason: Any, _p: Any) -> None:
        self.refusal = str(reason) if reason.is_failure else ""

    def _on_disconnect(self, *_: Any) -> None:
        self.disconnects += 1

    def _on_subscribe(self, _c: Any, _u: Any, _mid: int, reasons: list[Any], _p: Any) -> None:
        self.granted.append(not reasons[0].is_failure)
        self._suback.set()
