"""The controller's link, against the real broker and plain MQTT clients."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeter
from paho.mqtt.enums import MQTTErrorCode

from common.errors import InvalidInput, Unavailable
from common.ids import DeviceId
from common.wire import Kind, Topic
from controller.broker.embedded import EmbeddedBroker
from controller.broker.inbox import Inbox, Packet
from controller.broker.link import BrokerLink
from controller.broker.nats_config import ServerLimits
from tests.conftest import eventually
from tests.integration.mqtt_peer import Peer

D1 = DeviceId("d1")
REPORTED = Topic(D1, Kind.REPORTED)
DESIRED = Topic(D1, Kind.DESIRED)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(tmp_path / "broker", limits=ServerLimits(ack_wait_s=1.0), uniform=lambda: 0.1)
    await broker.start()
    await broker.admit(D1, "one")
    yield broker
    await broker.stop()


class Ledger:
    """What the link handed over; `refuse` makes the next hand-overs fail."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.refuse: list[Exception] = []
        self.waiting = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def take(self, topic: Topic, payload: bytes) -> None:
        self.waiting += 1
        await self.gate.wait()
        if self.refuse:
            raise self.refuse.pop(0)
        self.got.append((str(topic), payload))

    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.got]


def link_to(broker: EmbeddedBroker, ledger: Ledger, **options: Any) -> BrokerLink:
    return BrokerLink(
        broker.url, *broker.credentials, broker.client_id, ledger.take, **({"uniform": lambda: 0.05} | options)
    )


@pytest.fixture
async def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def link(broker: EmbeddedBroker, ledger: Ledger) -> AsyncIterator[BrokerLink]:
    link = link_to(broker, ledger)
    await link.start()
    await link.wait_connected()
    yield link
    await link.stop()


def device(broker: EmbeddedBroker, **options: Any) -> Peer:
    return Peer(broker.port, "d1", "one", **options)


async def test_messages_go_both_ways(broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger) -> None:
    async with device(broker) as peer:
        await peer.subscribe("fc/v1/d/d1/#")
        await peer.publish("fc/v1/d/d1/reported", b"state of things", retain=True)
        await link.publish(DESIRED, b"order")
        await link.publish(Topic(D1, Kind.CHUNK), bytes(128 * 1024))
        await eventually(lambda: ledger.got and len(peer.payloads("fc/v1/d/d1/dl")) == 1, "all three")
        assert ledger.got == [("fc/v1/d/d1/reported", b"state of things")]
        assert peer.payloads("fc/v1/d/d1/desired") == [b"order"]


async def test_an_order_is_kept_for_a_device_that_comes_later(broker: EmbeddedBroker, link: BrokerLink) -> None:
    await link.publish(DESIRED, b"old order")
    await link.publish(DESIRED, b"order")
    async with device(broker) as peer:
        await peer.receive_retained("fc/v1/d/d1/desired")
        assert set(peer.got) == {("fc/v1/d/d1/desired", b"order", True)}


async def test_reports_sent_while_the_controller_was_away_arrive(
    broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger
) -> None:
    await link.stop()
    async with device(broker) as peer:
        for number in range(300):
            await peer.publish("fc/v1/d/d1/tel", b"%d" % number)
    again = link_to(broker, ledger)
    await again.start()
    try:
        await eventually(lambda: len(ledger.got) >= 300, "all that was sent meanwhile")
        assert ledger.payloads() == [b"%d" % number for number in range(300)]
    finally:
        await again.stop()


async def test_what_was_not_committed_is_delivered_again(
    broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger
) -> None:
    ledger.gate.clear()
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"precious")
        await eventually(lambda: ledger.waiting, "the hand-over")
        await link.stop()
    survivor = Ledger()
    again = link_to(broker, survivor)
    await again.start()
    try:
        await eventually(lambda: survivor.got, "the second delivery")
        assert survivor.payloads() == [b"precious"]
    finally:
        await again.stop()


KILLED = """
import asyncio, os, signal, sys
from controller.broker.link import BrokerLink
async def killed_before_commit(topic, payload):
    for _ in range(100):
        await asyncio.sleep(0)  # an acknowledgement sent too early would leave the process here
    os.kill(os.getpid(), signal.SIGKILL)
async def main():
    link = BrokerLink(*sys.argv[1:5], killed_before_commit)
    await link.start()
    await link.wait_connected()
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_a_message_survives_a_controller_killed_before_its_commit(broker: EmbeddedBroker, ledger: Ledger) -> None:
    arguments = (broker.url, *broker.credentials, broker.client_id)
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    assert await program.stdout.readline() == b"up\n"
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"precious")
    assert await program.wait() == -signal.SIGKILL
    link = link_to(broker, ledger)
    await link.start()
    try:
        await eventually(lambda: ledger.got, "the second delivery")
        assert ledger.payloads() == [b"precious"]
    finally:
        await link.stop()


async def test_an_acknowledged_message_does_not_come_again(
    broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger
) -> None:
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"once")
        await eventually(lambda: ledger.got, "the message")
        await link.stop()
        again = link_to(broker, ledger)
        await again.start()
        await again.wait_connected()
        await peer.publish("fc/v1/d/d1/tel", b"next")
        await eventually(lambda: b"next" in ledger.payloads(), "the next message")
        await again.stop()
    assert ledger.payloads() == [b"once", b"next"]


@pytest.mark.parametrize("trouble", [Unavailable("the store is busy"), OSError("a mistake of ours")])
async def test_transient_trouble_is_tried_again(
    broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger, trouble: Exception
) -> None:
    ledger.refuse = [trouble, trouble]
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"precious")
        await eventually(lambda: ledger.got, "success in the end")


@pytest.mark.parametrize(
    "troubles", [[InvalidInput("nonsense")], [RuntimeError("a mistake of ours")] * 3], ids=["bad input", "our mistake"]
)
async def test_a_message_of_no_use_does_not_block_the_next(
    broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger, troubles: list[Exception]
) -> None:
    ledger.refuse = list(troubles)
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"bad")
        await eventually(lambda: not ledger.refuse, "the refusal")
        await peer.publish("fc/v1/d/d1/tel", b"good")
        await eventually(lambda: ledger.got, "the next message")
    await link.stop()
    again = link_to(broker, ledger)
    await again.start()
    await again.wait_connected()
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"last")
        await eventually(lambda: b"last" in ledger.payloads(), "the last message")
    await again.stop()
    assert ledger.payloads() == [b"good", b"last"]


async def test_a_topic_that_is_none_of_ours_is_acknowledged_and_dropped(ledger: Ledger) -> None:
    """A broker with looser rules than ours may carry such a thing."""
    acknowledged: list[Packet] = []
    inbox = Inbox(ledger.take, acknowledged.append, waiting_max=10, uniform=lambda: 0.0, meter=NoOpMeter("test"))
    foreign = Packet("fc/v1/d/NO SUCH/reported", b"", 1, 7, 1)
    inbox.put(foreign)
    worker = asyncio.create_task(inbox.work())
    await eventually(lambda: acknowledged, "its acknowledgement")
    worker.cancel()
    assert acknowledged == [foreign]
    assert ledger.got == []


async def test_the_link_comes_back_after_the_broker_was_killed(
    broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger, tmp_path: Path
) -> None:
    os.kill(int((tmp_path / "broker/nats.pid").read_text()), signal.SIGKILL)
    await eventually(lambda: not link.connected, "the loss")
    with pytest.raises(Unavailable):
        await link.publish(DESIRED, b"order")
    await eventually(lambda: link.connected, "the return")
    await link.publish(DESIRED, b"order")
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"hello again")
        await eventually(lambda: b"hello again" in ledger.payloads(), "a message after the return")


async def test_a_late_acknowledgement_is_not_sent_on_another_connection(
    broker: EmbeddedBroker, link: BrokerLink, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, its packet id could belong to a message that was not committed yet."""
    sent: list[int] = []
    really_send = link._client.ack

    def send(packet_id: int, qos: int) -> MQTTErrorCode:
        sent.append(packet_id)
        return really_send(packet_id, qos)

    monkeypatch.setattr(link._client, "ack", send)
    ledger.gate.clear()
    async with device(broker) as peer:
        await peer.publish("fc/v1/d/d1/tel", b"precious")
        await eventually(lambda: ledger.waiting == 1, "its arrival")
        os.kill(int((tmp_path / "broker/nats.pid").read_text()), signal.SIGKILL)
        await eventually(lambda: not link.connected, "the loss")
    await eventually(lambda: ledger.waiting == 2, "its second arrival")
    ledger.gate.set()
    await eventually(lambda: len(ledger.got) == 2 and sent, "both handled")
    await link.stop()
    assert len(sent) == 1


async def test_a_broker_that_forgot_us_is_noticed(broker: EmbeddedBroker, ledger: Ledger) -> None:
    new_sessions: list[bool] = []
    for _ in range(2):
        link = link_to(broker, ledger, on_up=new_sessions.append)
        await link.start()
        await link.wait_connected()
        await link.stop()
    assert new_sessions == [True, False]


async def test_without_a_broker_the_link_starts_and_says_so(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"mqtt://127.0.0.1:{unused.getsockname()[1]}"
        link = BrokerLink(url, "u", "p", "c", ledger.take)
        await link.start()
        await eventually(lambda: "cannot reach the broker" in caplog.text, "a word about it")
        with pytest.raises(Unavailable, match="not connected"):
            await link.publish(DESIRED, b"order")
        await link.stop()


async def test_a_wrong_password_is_named_and_not_printed(
    broker: EmbeddedBroker, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    link = BrokerLink(broker.url, "_controller", "not-the-secret", "c", ledger.take)
    await link.start()
    await eventually(lambda: "check the user name and the password" in caplog.text, "the reason")
    await link.stop()
    assert "not-the-secret" not in caplog.text


async def test_a_silent_broker_means_unavailable(ledger: Ledger, broker: EmbeddedBroker, tmp_path: Path) -> None:
    link = link_to(broker, ledger, publish_timeout_s=0.2)
    await link.start()
    await link.wait_connected()
    pid = int((tmp_path / "broker/nats.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable, match="did not acknowledge"):
            await link.publish(DESIRED, b"order")
    finally:
        os.kill(pid, signal.SIGCONT)
        await link.stop()


async def test_a_full_inbox_leaves_the_rest_to_the_broker_and_loses_nothing(broker: EmbeddedBroker) -> None:
    ledger = Ledger()
    ledger.gate.clear()
    link = link_to(broker, ledger, waiting_max=10)
    await link.start()
    await link.wait_connected()
    async with device(broker) as peer:
        for number in range(500):
            peer.client.publish("fc/v1/d/d1/tel", b"%d" % number, 1)
        await eventually(lambda: link._pump is not None and not link._pump.reading, "the pause")
        assert len(link._inbox._waiting) < 100
        ledger.gate.set()
        await eventually(lambda: len(set(ledger.payloads())) == 500, "every message")
    await link.stop()
