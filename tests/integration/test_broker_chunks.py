"""Chunks of real blobs, asked for and answered; the publishing side is a list, because MQTT is tested elsewhere."""

import asyncio
from pathlib import Path

import pytest

from common.artifact.digest import digest_of
from common.errors import InvalidInput
from common.ids import DeviceId, Digest
from common.wire import Chunk, ChunkRequest, Kind, Topic, decode, encode
from controller.broker.chunks import ChunkServer
from controller.registry.blobs import LocalBlobs
from tests.conftest import eventually

D1, D2 = DeviceId("d1"), DeviceId("d2")
DATA = bytes(range(256)) * 1000


class Line:
    """Where chunks go; while `open` is not set, publishing waits."""

    def __init__(self) -> None:
        self.sent: list[tuple[Topic, Chunk]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def publish(self, topic: Topic, payload: bytes) -> None:
        await self.open.wait()
        self.sent.append((topic, decode(payload, Chunk)))


@pytest.fixture
async def line() -> Line:
    return Line()


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path)


def ask(digest: Digest, offset: int = 0, length: int = 1000, device: DeviceId = D1) -> bytes:
    return encode(ChunkRequest(device=device, digest=digest, offset=offset, length=length))


async def answer(server: ChunkServer, line: Line, request: bytes) -> Chunk:
    server.take(D1, request)
    await eventually(lambda: line.sent, "an answer")
    topic, chunk = line.sent.pop()
    assert topic == Topic(D1, Kind.CHUNK)
    return chunk


async def test_a_file_comes_over_chunk_by_chunk(blobs: LocalBlobs, line: Line) -> None:
    ref = blobs.put_bytes(DATA)
    server = ChunkServer(blobs, line.publish)
    got = b""
    while len(got) < len(DATA):
        chunk = await answer(server, line, ask(ref.digest, len(got), 100_000))
        assert (chunk.offset, chunk.total, chunk.error) == (len(got), len(DATA), "")
        got += chunk.data
    assert digest_of(got) == ref.digest


async def test_what_is_not_there_is_answered_with_a_code(blobs: LocalBlobs, line: Line) -> None:
    ref = blobs.put_bytes(b"four")
    server = ChunkServer(blobs, line.publish)
    assert (await answer(server, line, ask(digest_of(b"other")))).error == "not_found"
    assert (await answer(server, line, ask(ref.digest, offset=4))).error == "invalid_input"


async def test_the_last_chunk_is_shorter_and_an_empty_file_has_one(blobs: LocalBlobs, line: Line) -> None:
    server = ChunkServer(blobs, line.publish)
    assert (await answer(server, line, ask(blobs.put_bytes(b"four").digest, 2))).data == b"ur"
    empty = await answer(server, line, ask(blobs.put_bytes(b"").digest))
    assert (empty.data, empty.total, empty.error) == (b"", 0, "")


async def test_a_request_in_another_device_s_name_is_refused(blobs: LocalBlobs, line: Line) -> None:
    server = ChunkServer(blobs, line.publish)
    with pytest.raises(InvalidInput, match="in the name of 'd2'"):
        server.take(D1, ask(digest_of(b""), device=D2))
    with pytest.raises(InvalidInput):
        server.take(D1, b"{")


async def test_a_greedy_device_does_not_starve_another(blobs: LocalBlobs, line: Line) -> None:
    ref = blobs.put_bytes(DATA)
    server = ChunkServer(blobs, line.publish, per_device_max=4, total_max=6)
    line.open.clear()
    for _ in range(100):
        server.take(D1, ask(ref.digest))
    server.take(D2, ask(ref.digest, device=D2))
    line.open.set()
    await eventually(lambda: len(line.sent) == 5, "four for one, one for the other")
    assert [topic.device for topic, _ in line.sent].count(D2) == 1
    server.take(D1, ask(ref.digest))
    await eventually(lambda: len(line.sent) == 6, "an answer after the others are done")


async def test_all_devices_together_are_bounded_and_stopping_drops_the_rest(blobs: LocalBlobs, line: Line) -> None:
    ref = blobs.put_bytes(DATA)
    server = ChunkServer(blobs, line.publish, total_max=3)
    line.open.clear()
    for number in range(10):
        device = DeviceId(f"d{number}")
        server.take(device, ask(ref.digest, device=device))
    assert len(server._answers) == 3
    await server.stop()
    assert (len(server._answers), line.sent) == (0, [])
