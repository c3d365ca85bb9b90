"""The agent's MQTT line against the real broker: births, deaths, orders, and what happens when the line breaks."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from common.backoff import Backoff
from common.clock import SystemClock
from common.errors import InvalidInput, Unauthenticated, Unavailable
from common.ids import DeviceId, Digest
from common.wire import Capabilities, Chunk, ChunkRequest, Presence, ReportedState, decode, encode
from common.wire.topics import Kind, Topic
from controller.broker.child import ServerProcess
from controller.broker.embedded import EmbeddedBroker
from edge_agent.broker import AgentLink, LinkLimits, parse_broker_url
from edge_agent.fetch.session import tls_context
from edge_agent.identity import BrokerAccess, Identity
from tests.conftest import eventually
from tests.faults import FaultProxy
from tests.integration.mqtt_peer import Peer
from tests.tls_files import TlsFiles, make_tls_files

D1 = DeviceId("d1")
STATE, DESIRED = Topic(D1, Kind.STATE), Topic(D1, Kind.DESIRED)
ZEROS = Digest(f"sha256:{'0' * 64}")
SMALL_BURST = 300
QUICK = LinkLimits(acknowledge_s=5.0, backoff=Backoff(base_s=0.02, cap_s=0.2))


class Device:
    """A link with everything around it recorded."""

    def __init__(
        self,
        port: int,
        *,
        password: str = "one",
        limits: LinkLimits = QUICK,
        url: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.orders: list[bytes] = []
        self.changes: list[bool] = []
        self.epochs = 0
        self.link = AgentLink(
            identity(url or f"mqtt://127.0.0.1:{port}", password),
            on_desired=self._on_desired,
            epoch_source=self._next_epoch,
            capabilities=lambda: Capabilities(agent_version="test"),
            clock=SystemClock(),
            on_connection=self.changes.append,
            tls=tls,
            limits=limits,
        )

    async def __aenter__(self) -> "Device":
        await self.link.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.link.stop()

    async def connected(self) -> None:
        await eventually(lambda: self.link.connected, "the device is connected")

    def _next_epoch(self) -> int:
        self.epochs += 1
        return self.epochs

    async def _on_desired(self, envelope: bytes) -> None:
        self.orders.append(envelope)
        if envelope == b"refused":
            raise InvalidInput("no such thing", field="order")


def identity(url: str, password: str) -> Identity:
    return Identity(
        device=D1,
        device_token="t",
        controller_url="http://127.0.0.1:1",
        broker=BrokerAccess(url=url, username="d1", password=password),
        client_id=f"{D1}-0123456789abcdef",
        signing_keys=(),
        heartbeat_s=15.0,
        poll_s=60.0,
    )


def report(generation: int) -> ReportedState:
    return ReportedState(device=D1, epoch=0, seq=0, sent_at=0.0, generation=generation)


def presences(peer: Peer) -> list[tuple[int, bool]]:
    told = [decode(payload, Presence) for payload in peer.payloads(str(STATE))]
    return [(presence.epoch, presence.online) for presence in told]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(tmp_path / "broker")
    await broker.start()
    await broker.admit(D1, "one")
    yield broker
    await broker.stop()


@pytest.fixture
async def center(broker: EmbeddedBroker) -> AsyncIterator[Peer]:
    async with Peer(broker.port, *broker.credentials) as center:
        for kind in (Kind.STATE, Kind.REPORTED, Kind.CHUNK_REQUEST):
            assert await center.subscribe(str(Topic(D1, kind)))
        yield center


async def test_a_device_announces_its_birth_with_what_it_can_do(broker: EmbeddedBroker, center: Peer) -> None:
    async with Device(broker.port) as device:
        await device.connected()
        await eventually(lambda: presences(center) == [(1, True)], "the birth")
        birth = decode(center.payloads(str(STATE))[0], Presence)
        assert birth.capabilities == Capabilities(agent_version="test")
        async with Peer(broker.port, *broker.credentials) as late:
            await late.subscribe(str(STATE))
            await eventually(lambda: late.got, "the retained birth")
            assert late.got[0].retained


async def test_a_clean_stop_says_goodbye(broker: EmbeddedBroker, center: Peer) -> None:
    async with Device(broker.port) as device:
        await device.connected()

    await eventually(lambda: presences(center) == [(1, True), (1, False)], "birth and death")
    assert device.changes == [True, False]


async def test_a_cut_line_makes_the_will_speak_and_a_new_epoch_begin(broker: EmbeddedBroker, center: Peer) -> None:
    async with FaultProxy(broker.port) as proxy, Device(proxy.port) as device:
        await device.connected()
        proxy.cut()
        await eventually(lambda: device.changes == [True, False, True], "the device is back")
        await eventually(lambda: len(presences(center)) >= 3, "will and second birth")
        assert set(presences(center)) == {(1, True), (1, False), (2, True)}


async def test_an_order_that_waited_is_heard_after_connecting_and_a_new_one_at_once(
    broker: EmbeddedBroker, center: Peer
) -> None:
    await center.publish(str(DESIRED), b"first", retain=True)
    async with Device(broker.port) as device:
        await eventually(lambda: device.orders == [b"first"], "the retained order")
        await center.publish(str(DESIRED), b"second", retain=True)
        await eventually(lambda: device.orders == [b"first", b"second"], "the new order")


async def test_orders_that_are_refused_empty_or_too_large_do_not_end_the_hearing(
    broker: EmbeddedBroker, center: Peer
) -> None:
    async with Device(broker.port) as device:
        await device.connected()
        await center.publish(str(DESIRED), b"refused")
        await eventually(lambda: device.orders, "the refused order was heard")
        await center.publish(str(DESIRED), b"")
        await center.publish(str(DESIRED), b"x" * 600_000)
        await center.publish(str(DESIRED), b"good")
        await eventually(lambda: device.orders == [b"refused", b"good"], "the good order")
        assert device.link.connected


async def test_a_report_is_stamped_retained_and_acknowledged(broker: EmbeddedBroker, center: Peer) -> None:
    async with Device(broker.port) as device:
        await device.connected()
        await device.link.publish(report(1))
        await device.link.publish(report(2))

        topic = str(Topic(D1, Kind.REPORTED))
        await eventually(lambda: len(center.payloads(topic)) == 2, "both reports")
        told = [decode(payload, ReportedState) for payload in center.payloads(topic)]
        assert [(state.epoch, state.seq, state.generation) for state in told] == [(1, 1, 1), (1, 2, 2)]
        assert all(state.sent_at > 0 for state in told)


async def test_without_a_broker_publishing_fails_at_once_and_nothing_is_queued(
    broker: EmbeddedBroker, center: Peer
) -> None:
    async with FaultProxy(broker.port) as proxy:
        proxy.refuse = True
        async with Device(proxy.port) as device:
            for generation in range(100):
                with pytest.raises(Unavailable):
                    await device.link.publish(report(generation))
            with pytest.raises(Unavailable):
                await device.link.request_chunk(ChunkRequest(device=D1, digest=ZEROS, offset=0, length=1))
            proxy.refuse = False
            await device.connected()
            await device.link.publish(report(100))

    topic = str(Topic(D1, Kind.REPORTED))
    await eventually(lambda: center.payloads(topic), "the last report")
    assert [decode(payload, ReportedState).generation for payload in center.payloads(topic)] == [100]


async def test_attempts_that_reach_nobody_use_up_no_epoch() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()

    async with Device(port) as device:
        await eventually(lambda: device.link.last_error, "an attempt failed")
        await asyncio.sleep(0.1)  # more attempts; what is asserted holds after any number of them
        assert device.epochs == 1
        assert device.link.stamp(report(1)).epoch == 1


async def test_a_broker_that_stops_acknowledging_is_left_for_a_new_connection(
    broker: EmbeddedBroker, center: Peer
) -> None:
    impatient = LinkLimits(acknowledge_s=0.3, backoff=QUICK.backoff)
    async with FaultProxy(broker.port) as proxy, Device(proxy.port, limits=impatient) as device:
        await device.connected()
        proxy.stall = True
        with pytest.raises(Unavailable, match="did not acknowledge"):
            await device.link.publish(report(1))
        proxy.stall = False
        await eventually(lambda: device.link.connected and device.epochs >= 2, "a new connection")
        await device.link.publish(report(2))


async def test_a_publication_under_way_fails_when_the_line_breaks(broker: EmbeddedBroker) -> None:
    async with FaultProxy(broker.port) as proxy, Device(proxy.port) as device:
        await device.connected()
        proxy.stall = True
        under_way = asyncio.create_task(device.link.publish(report(1)))
        await asyncio.sleep(0)
        proxy.cut()
        with pytest.raises(Unavailable):
            await under_way


async def test_a_wrong_password_is_told_as_such_and_a_right_one_heals_it(broker: EmbeddedBroker) -> None:
    async with Device(broker.port, password="wrong") as device:
        await eventually(lambda: isinstance(device.link.last_error, Unauthenticated), "the refusal")
        await broker.admit(D1, "wrong")
        await device.connected()
        assert device.link.last_error is None


async def test_the_line_comes_back_after_the_broker_was_restarted(broker: EmbeddedBroker) -> None:
    async with Device(broker.port) as device:
        await device.connected()
        await broker.stop()
        await eventually(lambda: not device.link.connected, "the line is down")
        await broker.start()
        await device.connected()
        await device.link.publish(report(1))


async def test_stopping_while_connecting_ends_quickly_and_cleanly(broker: EmbeddedBroker) -> None:
    async with FaultProxy(broker.port) as proxy:
        proxy.stall = True
        async with asyncio.timeout(10), Device(proxy.port) as device:
            await eventually(lambda: proxy.connections, "a connection attempt")
        assert device.changes == []


async def test_chunks_reach_their_listener_and_damaged_ones_do_not(broker: EmbeddedBroker, center: Peer) -> None:
    async with Device(broker.port) as device:
        heard: list[Chunk] = []
        device.link.listen_chunks(heard.append)
        await device.connected()
        request = ChunkRequest(device=D1, digest=ZEROS, offset=3, length=5)
        await device.link.request_chunk(request)
        topic = str(Topic(D1, Kind.CHUNK_REQUEST))
        await eventually(lambda: center.payloads(topic), "the request")
        assert decode(center.payloads(topic)[0], ChunkRequest) == request

        chunk = Chunk(device=D1, digest=request.digest, offset=3, total=8, data=b"bytes")
        await center.publish(str(Topic(D1, Kind.CHUNK)), b"rubbish")
        await center.publish(str(Topic(D1, Kind.CHUNK)), encode(chunk))
        await eventually(lambda: heard == [chunk], "the good chunk")


@pytest.mark.parametrize("url", ["http://h:1", "mqtt://h", "mqtt://:1", "mqtt://h:x", "mqtt://u:p@h:1", "h:1", ""])
async def test_a_broker_address_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="mqtt"):
        parse_broker_url(url)


@pytest.fixture
async def tls(tmp_path: Path) -> AsyncIterator[tuple[TlsFiles, str]]:
    """A broker behind TLS: the files, and its URL."""
    files, port = make_tls_files(tmp_path), free_port()
    config = {
        "server_name": "tls",
        "host": "127.0.0.1",
        "port": -1,
        "jetstream": {"store_dir": str(tmp_path / "jetstream")},
        "mqtt": {
            "host": "127.0.0.1",
            "port": port,
            "tls": {"cert_file": str(files.certificate), "key_file": str(files.key)},
        },
        "authorization": {"users": [{"user": "d1", "password": "one"}]},
    }
    path = tmp_path / "nats.json"
    path.write_bytes(msgspec.json.encode(config))
    server = await ServerProcess.start(path, tmp_path / "nats.pid")
    yield files, f"mqtts://localhost:{port}"
    await server.stop()


async def test_an_encrypted_line_carries_large_messages_and_bursts_of_small_ones(tls: tuple[TlsFiles, str]) -> None:
    files, url = tls
    async with Device(0, url=url, tls=tls_context(files.authority)) as device:
        heard: list[Chunk] = []
        device.link.listen_chunks(heard.append)
        await device.connected()
        await device.link.publish(report(1))
        async with encrypted_peer(url, files) as peer:
            chunk = Chunk(device=D1, digest=ZEROS, offset=0, total=131072, data=bytes(131072))
            for _ in range(8):
                await peer.publish(str(Topic(D1, Kind.CHUNK)), encode(chunk))
            await eventually(lambda: len(heard) == 8, "all chunks")
            small = encode(Chunk(device=D1, digest=ZEROS, offset=0, total=1, data=b"x"))
            for _ in range(SMALL_BURST):
                peer.client.publish(str(Topic(D1, Kind.CHUNK)), small)
            # Many of these share a TLS record: once it is decrypted, the socket says nothing about the rest of it.
            await eventually(lambda: len(heard) == 8 + SMALL_BURST, "the whole burst", within_s=15)


async def test_a_broker_that_no_trusted_authority_vouches_for_gets_no_password(tls: tuple[TlsFiles, str]) -> None:
    async with Device(0, url=tls[1], tls=tls_context(None)) as device:
        await eventually(lambda: device.link.last_error, "the failure")
        assert "certificate" in str(device.link.last_error).lower()
        assert not device.link.connected
        assert device.epochs == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def encrypted_peer(url: str, files: TlsFiles) -> Peer:
    _, port, _ = parse_broker_url(url)
    peer = Peer(port, "d1", "one")
    peer.client.tls_set(str(files.authority))
    peer.client.tls_insecure_set(True)  # the peer connects to 127.0.0.1, the certificate says localhost
    return peer
