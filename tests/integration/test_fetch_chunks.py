"""Downloads over MQTT: through the real broker from the real chunk server, and over a line that loses and shuffles."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from common.artifact import ArtifactRef, digest_of
from common.artifact.protobuf import Span
from common.backoff import Backoff
from common.clock import SystemClock
from common.errors import IntegrityFailure, NotFound, Unavailable
from common.ids import DeviceId
from common.wire import Capabilities, Chunk, ChunkRequest
from common.wire.topics import Kind, Topic
from controller.broker.chunks import ChunkServer
from controller.broker.embedded import EmbeddedBroker
from controller.broker.link import BrokerLink
from controller.registry.blobs import LocalBlobs
from edge_agent.broker import AgentLink, LinkLimits
from edge_agent.fetch import ChunkFetcher, Fetcher, FetchLimits, Pace, Ranges, make_fetcher, open_session
from edge_agent.fetch.chunks import WINDOW_CHUNKS
from edge_agent.fetch.partial import partial_path
from edge_agent.identity import BrokerAccess, Identity
from tests.blob_server import TOKEN, BlobServer
from tests.conftest import eventually
from tests.faults import FaultProxy

D1 = DeviceId("d1")
DATA = random.Random(2).randbytes(700_000)
REF = ArtifactRef(digest_of(DATA), len(DATA))


class Line:
    """A simulated MQTT line to a chunk server; `fate` says how many copies of an answer come, and how late."""

    def __init__(self, blobs: dict[str, bytes], fate: Callable[[], tuple[int, float]] = lambda: (1, 0.0)) -> None:
        self.blobs = blobs
        self.connected = True
        self.device = D1
        self.requests: list[ChunkRequest] = []
        self.under_way = self.most_under_way = 0
        self._fate = fate
        self._listener: Callable[[Chunk], None] = lambda _chunk: None

    def listen_chunks(self, listener: Callable[[Chunk], None]) -> None:
        self._listener = listener

    async def request_chunk(self, request: ChunkRequest) -> None:
        if not self.connected:
            raise Unavailable("not connected to the broker")
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        copies, delay_s = self._fate()
        loop = asyncio.get_running_loop()
        loop.call_later(delay_s, self._settle)
        for _ in range(copies):
            loop.call_later(delay_s, lambda: self._listener(self._answer(request)))

    def _settle(self) -> None:
        self.under_way -= 1

    def _answer(self, request: ChunkRequest) -> Chunk:
        data = self.blobs.get(request.digest)
        chunk = Chunk(device=D1, digest=request.digest, offset=request.offset, total=len(data or b""))
        if data is None:
            return Chunk(device=D1, digest=request.digest, offset=request.offset, total=0, error="not_found")
        piece = data[request.offset : request.offset + request.length]
        return Chunk(device=D1, digest=chunk.digest, offset=chunk.offset, total=chunk.total, data=piece)


def over(line: Line, **limits: float) -> ChunkFetcher:
    set_limits = FetchLimits(**({"chunk_bytes": 16 * 1024, "chunk_timeout_s": 0.05} | limits))  # type: ignore[arg-type]  # whole numbers where they belong
    return ChunkFetcher(line, set_limits, Pace(0, SystemClock()))


async def test_chunks_make_the_artifact_with_a_bounded_window(tmp_path: Path) -> None:
    line = Line({REF.digest: DATA}, fate=lambda: (1, 0.002))

    transfer = await over(line, chunk_timeout_s=5.0).fetch(REF, tmp_path / "model")

    assert (tmp_path / "model").read_bytes() == DATA
    assert (transfer.bytes, transfer.resumed_bytes, transfer.transport) == (len(DATA), 0, "mqtt")
    assert line.most_under_way == WINDOW_CHUNKS
    assert sum(request.length for request in line.requests) == len(DATA)


@pytest.mark.parametrize("seed", range(5))
async def test_lost_late_and_repeated_answers_do_no_harm(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    line = Line({REF.digest: DATA}, fate=lambda: (chance.choice([0, 1, 1, 1, 2]), chance.uniform(0, 0.01)))

    transfer = await over(line, chunk_attempts_max=20).fetch(REF, tmp_path / "model")

    assert (tmp_path / "model").read_bytes() == DATA, f"seed {seed}"
    assert transfer.bytes == len(DATA)


async def test_a_silent_controller_is_given_up_after_a_bounded_number_of_requests(tmp_path: Path) -> None:
    line = Line({REF.digest: DATA}, fate=lambda: (0, 0.0))

    with pytest.raises(Unavailable, match="no answer to 3 requests"):
        await over(line, chunk_attempts_max=3).fetch(REF, tmp_path / "model")

    assert len(line.requests) <= 3 * WINDOW_CHUNKS


async def test_chunks_go_on_where_a_download_stopped_whatever_its_way_was(tmp_path: Path) -> None:
    partial_path(REF, tmp_path / "model").write_bytes(DATA[:100_001])
    line = Line({REF.digest: DATA})

    transfer = await over(line, chunk_timeout_s=5.0).fetch(REF, tmp_path / "model")

    assert min(request.offset for request in line.requests) == 100_001
    assert (transfer.bytes, transfer.resumed_bytes) == (len(DATA) - 100_001, 100_001)
    assert (tmp_path / "model").read_bytes() == DATA


async def test_ranges_come_in_chunks_of_their_own_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    spans = (Span(5, 30), Span(100_000, 140_000), Span(len(DATA) - 1, len(DATA)))
    pieces = b"".join(DATA[start:end] for start, end in spans)
    ranges = Ranges(spans, lambda path: path.exists() and path.read_bytes() == pieces)
    partial_path(REF, tmp_path / "pieces", ranges).write_bytes(pieces[:10])
    line = Line({REF.digest: DATA})

    transfer = await over(line, chunk_timeout_s=5.0).fetch(REF, tmp_path / "pieces", ranges=ranges)

    assert (tmp_path / "pieces").read_bytes() == pieces
    assert (transfer.bytes, transfer.resumed_bytes, transfer.transport) == (len(pieces) - 10, 10, "mqtt")
    assert sorted((request.offset, request.length) for request in line.requests) == [
        (15, 15), (100_000, 16384), (116_384, 16384), (132_768, 7232), (len(DATA) - 1, 1)
    ]  # fmt: skip


async def test_tampered_short_and_foreign_chunks_are_refused(tmp_path: Path) -> None:
    tampered = Line({REF.digest: DATA[:-1] + b"\0"})
    with pytest.raises(IntegrityFailure, match=REF.digest):
        await over(tampered).fetch(REF, tmp_path / "model")
    short = Line({REF.digest: DATA[:-1]})
    with pytest.raises(IntegrityFailure, match="does not belong"):
        await over(short).fetch(REF, tmp_path / "model")
    assert not (tmp_path / "model").exists()


async def test_an_unknown_artifact_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await over(Line({})).fetch(REF, tmp_path / "model")


class World:
    """A broker, a controller's chunk server, a blob server over HTTP, and a device that can use both."""

    def __init__(self, folder: Path) -> None:
        self.blobs = LocalBlobs(folder / "blobs")
        self.broker = EmbeddedBroker(folder / "broker")
        self.http = BlobServer()
        self.center: BrokerLink | None = None
        self.chunks: ChunkServer | None = None

    async def start(self) -> None:
        await self.broker.start()
        await self.broker.admit(D1, "one")
        self.center = BrokerLink(self.broker.url, *self.broker.credentials, self.broker.client_id, self._take)
        self.chunks = ChunkServer(self.blobs, self.center.publish)
        await self.center.start()

    async def stop(self) -> None:
        assert self.chunks is not None
        assert self.center is not None
        await self.chunks.stop()
        await self.center.stop()
        await self.broker.stop()

    async def _take(self, topic: Topic, payload: bytes) -> None:
        if topic.kind is Kind.CHUNK_REQUEST and self.chunks is not None:
            self.chunks.take(topic.device, payload)

    def connect(self, port: int) -> AgentLink:
        return AgentLink(
            Identity(
                device=D1,
                device_token=TOKEN,
                controller_url=self.http.url,
                broker=BrokerAccess(url=f"mqtt://127.0.0.1:{port}", username="d1", password="one"),
                client_id="d1-secret",
                signing_keys=(),
                heartbeat_s=15.0,
                poll_s=60.0,
            ),
            on_desired=_no_orders,
            epoch_source=iter(range(1, 1000)).__next__,
            capabilities=lambda: Capabilities(agent_version="test"),
            clock=SystemClock(),
            limits=LinkLimits(backoff=Backoff(base_s=0.02, cap_s=0.2)),
        )


async def _no_orders(_envelope: bytes) -> None:
    raise AssertionError("nobody sent an order")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start()
    async with world.http:
        yield world
    await world.stop()


async def fetch(fetcher: Fetcher, ref: ArtifactRef, destination: Path) -> str:
    return (await fetcher.fetch(ref, destination)).transport


async def test_small_artifacts_come_over_mqtt_and_large_ones_over_http(world: World, tmp_path: Path) -> None:
    small, large = world.blobs.put_bytes(DATA), world.http.add(DATA * 2)
    link = world.connect(world.broker.port)
    await link.start()
    async with open_session(TOKEN) as session:
        fetcher = make_fetcher(world.http.url, session, link, FetchLimits(), SystemClock())
        await eventually(lambda: link.connected, "the device is connected")

        assert await fetch(fetcher, small, tmp_path / "small") == "mqtt"
        assert await fetch(fetcher, large, tmp_path / "large") == "http"
        assert (tmp_path / "small").read_bytes() == DATA
        assert (tmp_path / "large").read_bytes() == DATA * 2
        assert len(world.http.ranges) == 1
    await link.stop()


async def test_a_few_ranges_of_a_large_artifact_come_over_mqtt(world: World, tmp_path: Path) -> None:
    large = DATA * 2
    world.blobs.put_bytes(large)
    ref = world.http.add(large)
    ranges = Ranges((Span(3, 9), Span(1_000_000, 1_000_100)), lambda path: path.exists() and path.stat().st_size == 106)
    async with open_session(TOKEN) as session:
        link = world.connect(world.broker.port)
        await link.start()
        fetcher = make_fetcher(world.http.url, session, link, FetchLimits(mqtt_bytes_max=200), SystemClock())
        await eventually(lambda: link.connected, "the device is connected")
        transfer = await fetcher.fetch(ref, tmp_path / "pieces", ranges=ranges)
        await link.stop()
    assert (transfer.transport, transfer.bytes) == ("mqtt", 106)
    assert (tmp_path / "pieces").read_bytes() == large[3:9] + large[1_000_000:1_000_100]


async def test_http_takes_over_what_mqtt_does_not_finish(world: World, tmp_path: Path) -> None:
    world.blobs.put_bytes(DATA)
    ref = world.http.add(DATA)
    only_http = world.http.add(b"not among the chunk server's blobs")
    async with FaultProxy(world.broker.port) as proxy, open_session(TOKEN) as session:
        link = world.connect(proxy.port)
        await link.start()
        limits = FetchLimits(chunk_bytes=64 * 1024, chunk_timeout_s=0.1, chunk_attempts_max=2)
        fetcher = make_fetcher(world.http.url, session, link, limits, SystemClock())
        await eventually(lambda: link.connected, "the device is connected")

        def stall(done: int, _total: int) -> None:
            proxy.stall = done < REF.size

        transfer = await fetcher.fetch(ref, tmp_path / "model", stall)
        proxy.stall = False
        await eventually(lambda: link.connected, "the device is connected")

        assert (transfer.transport, transfer.bytes, transfer.resumed_bytes) == ("http", len(DATA), 0)
        assert world.http.ranges[0].startswith("bytes=")
        assert (tmp_path / "model").read_bytes() == DATA
        assert await fetch(fetcher, only_http, tmp_path / "other") == "http"
        await link.stop()


async def test_two_that_want_the_same_artifact_do_not_spoil_each_other(world: World, tmp_path: Path) -> None:
    ref = world.http.add(DATA * 3)
    async with open_session(TOKEN) as session:
        fetcher = make_fetcher(world.http.url, session, None, FetchLimits(), SystemClock())
        first, second = await asyncio.gather(
            fetcher.fetch(ref, tmp_path / "model"), fetcher.fetch(ref, tmp_path / "model")
        )

    assert sorted([first.bytes, second.bytes]) == [0, ref.size]
    assert len(world.http.ranges) == 1
