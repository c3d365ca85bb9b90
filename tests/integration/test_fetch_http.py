"""Downloads over HTTP: whatever the network, the disk or the server does, the file is right or it is not there."""

import asyncio
import errno
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from common.artifact import ArtifactRef, digest_of, hex_of
from common.artifact.protobuf import Span
from common.clock import SystemClock
from common.errors import IntegrityFailure, NotFound, StorageFull, Unauthenticated, Unavailable
from edge_agent.fetch import FetchLimits, HttpFetcher, Pace, Ranges, Session, open_session
from edge_agent.fetch.partial import partial_path
from tests.blob_server import TOKEN, BlobServer
from tests.conftest import eventually
from tests.faults import FaultProxy

DATA = random.Random(1).randbytes(3_000_000)
SPANS = (Span(10, 20), Span(500_000, 1_500_000), Span(2_900_000, 3_000_000))
PIECES = b"".join(DATA[start:end] for start, end in SPANS)
RANGES = Ranges(SPANS, lambda path: path.exists() and path.read_bytes() == PIECES)


@pytest.fixture
async def server() -> AsyncIterator[BlobServer]:
    async with BlobServer() as server:
        yield server


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    async with open_session(TOKEN) as session:
        yield session


def fetcher(session: Session, port: int, **limits: float) -> HttpFetcher:
    set_limits = FetchLimits(**limits)  # type: ignore[arg-type]  # the tests give whole numbers where they belong
    pace = Pace(set_limits.rate_bytes_per_s, SystemClock())
    return HttpFetcher(f"http://127.0.0.1:{port}", session, set_limits, pace)


def leave_partial(ref: ArtifactRef, destination: Path, data: bytes) -> Path:
    path = partial_path(ref, destination)
    path.write_bytes(data)
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_download_ends_complete_verified_and_alone(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination, seen = server.add(DATA), tmp_path / "model", list[tuple[int, int]]()

    transfer = await fetcher(session, server.port).fetch(
        ref, destination, lambda done, total: seen.append((done, total))
    )

    assert destination.read_bytes() == DATA
    assert (transfer.bytes, transfer.resumed_bytes, transfer.transport) == (len(DATA), 0, "http")
    assert seen[-1] == (len(DATA), len(DATA))
    assert seen == sorted(seen)
    assert files_in(tmp_path) == ["model"]


async def test_what_is_there_already_is_not_fetched_again(server: BlobServer, session: Session, tmp_path: Path) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    destination.write_bytes(DATA)

    transfer = await fetcher(session, server.port).fetch(ref, destination)

    assert (transfer.bytes, transfer.transport, server.ranges) == (0, "none", [])


async def test_nothing_is_fetched_for_an_empty_artifact(server: BlobServer, session: Session, tmp_path: Path) -> None:
    await fetcher(session, server.port).fetch(server.add(b""), tmp_path / "model")

    assert (tmp_path / "model").read_bytes() == b""
    assert server.ranges == []


async def test_a_broken_download_goes_on_where_it_stopped(server: BlobServer, session: Session, tmp_path: Path) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    async with FaultProxy(server.port) as proxy:
        proxy.truncate_after = 1_500_000
        with pytest.raises(Unavailable):
            await fetcher(session, proxy.port).fetch(ref, destination)
        kept = partial_path(ref, destination).stat().st_size
        proxy.truncate_after = None
        transfer = await fetcher(session, proxy.port).fetch(ref, destination)

    assert kept > 1_000_000, "all but what the client had not looked at yet"
    assert server.ranges == ["", f"bytes={kept}-"]
    assert (transfer.bytes, transfer.resumed_bytes) == (len(DATA) - kept, kept)
    assert destination.read_bytes() == DATA


async def test_a_line_that_went_dead_is_given_up_and_resumed(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    async with FaultProxy(server.port) as proxy:
        proxy.stall_after = len(DATA) // 2
        with pytest.raises(Unavailable, match="stopped sending"):
            await fetcher(session, proxy.port, idle_s=0.2).fetch(ref, destination)
    transfer = await fetcher(session, server.port).fetch(ref, destination)

    assert transfer.resumed_bytes > 0
    assert destination.read_bytes() == DATA


async def test_a_server_that_never_answers_is_given_up(server: BlobServer, session: Session, tmp_path: Path) -> None:
    async with FaultProxy(server.port) as proxy:
        proxy.stall = True
        with pytest.raises(Unavailable):
            await fetcher(session, proxy.port, total_s=0.2).fetch(server.add(DATA), tmp_path / "model")


async def test_a_server_that_is_not_there_is_unavailable(server: BlobServer, session: Session, tmp_path: Path) -> None:
    async with FaultProxy(server.port) as proxy:
        proxy.refuse = True
        with pytest.raises(Unavailable, match="broke off"):
            await fetcher(session, proxy.port).fetch(server.add(DATA), tmp_path / "model")


async def test_rubbish_left_by_an_earlier_run_costs_one_download_from_the_start(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    leave_partial(ref, destination, b"\0" * 2_000_000)

    transfer = await fetcher(session, server.port).fetch(ref, destination)

    assert server.ranges == ["bytes=2000000-", ""]
    assert (transfer.bytes, transfer.resumed_bytes) == (1_000_000 + len(DATA), 0)
    assert destination.read_bytes() == DATA


async def test_a_partial_file_that_is_too_long_is_started_again(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    leave_partial(ref, destination, DATA + b"more")

    await fetcher(session, server.port).fetch(ref, destination)

    assert server.ranges == [""]
    assert destination.read_bytes() == DATA


async def test_a_complete_partial_file_only_needs_its_name(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    leave_partial(ref, destination, DATA)

    transfer = await fetcher(session, server.port).fetch(ref, destination)

    assert (transfer.bytes, transfer.resumed_bytes, server.ranges) == (0, len(DATA), [])
    assert destination.read_bytes() == DATA


async def test_tampered_bytes_are_refused_and_nothing_is_kept(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref = server.add(DATA)
    server.blobs[ref.digest] = DATA[:-1] + b"\0"

    with pytest.raises(IntegrityFailure, match=ref.digest):
        await fetcher(session, server.port).fetch(ref, tmp_path / "model")

    assert files_in(tmp_path) == []


async def test_tampered_bytes_after_a_resume_get_one_fair_chance_only(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    leave_partial(ref, destination, DATA[:1000])
    server.blobs[ref.digest] = DATA[:-1] + b"\0"

    with pytest.raises(IntegrityFailure):
        await fetcher(session, server.port).fetch(ref, destination)

    assert server.ranges == ["bytes=1000-", ""]
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("offered", [len(DATA) - 1, len(DATA) + 1])
async def test_another_length_than_promised_is_refused_unread(
    server: BlobServer, session: Session, tmp_path: Path, offered: int
) -> None:
    ref = server.add(DATA)
    server.blobs[ref.digest] = (DATA + b"!")[:offered]

    with pytest.raises(IntegrityFailure, match="promised"):
        await fetcher(session, server.port).fetch(ref, tmp_path / "model")


async def test_an_endless_body_is_read_up_to_the_promised_size_only(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, written = server.add(DATA), 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(DATA)
        while True:
            await response.write(b"\0" * 65536)
            written += 65536

    server.misbehave = endless
    transfer = await fetcher(session, server.port).fetch(ref, tmp_path / "model")

    assert transfer.bytes == len(DATA)
    assert (tmp_path / "model").read_bytes() == DATA


async def test_a_chunked_body_that_ends_early_is_a_broken_download(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref = server.add(DATA)

    async def short(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(DATA[:1000])
        return response

    server.misbehave = short
    with pytest.raises(Unavailable, match="broke off"):
        await fetcher(session, server.port).fetch(ref, tmp_path / "model")

    assert partial_path(ref, tmp_path / "model").read_bytes() == DATA[:1000]


async def test_a_server_that_ignores_range_makes_us_start_again(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    leave_partial(ref, destination, DATA[:1000])

    async def whole(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=DATA)

    server.misbehave = whole
    transfer = await fetcher(session, server.port).fetch(ref, destination)

    assert (transfer.bytes, transfer.resumed_bytes) == (len(DATA), 0)
    assert destination.read_bytes() == DATA


@pytest.mark.parametrize("content_range", ["", "bytes 0-2999999/3000000", "bytes 1000-2999999/3000001", "rubbish"])
async def test_an_answer_for_another_range_is_never_appended(
    server: BlobServer, session: Session, tmp_path: Path, content_range: str
) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    leave_partial(ref, destination, DATA[:1000])

    async def wrong(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return web.Response(status=206, body=DATA, headers={"Content-Range": content_range})
        return web.Response(body=DATA)

    server.misbehave = wrong
    transfer = await fetcher(session, server.port).fetch(ref, destination)

    assert transfer.bytes == len(DATA)  # not one of the wrong ones
    assert server.ranges == ["bytes=1000-", ""]
    assert destination.read_bytes() == DATA


async def test_a_redirect_is_not_followed(server: BlobServer, session: Session, tmp_path: Path) -> None:
    async def portal(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "/v1/elsewhere"})

    server.misbehave = portal
    with pytest.raises(Unavailable, match="302"):
        await fetcher(session, server.port).fetch(server.add(DATA), tmp_path / "model")


async def test_refusals_say_whose_fault_it_was(server: BlobServer, session: Session, tmp_path: Path) -> None:
    unknown = ArtifactRef(digest_of(b"unknown"), 7)
    with pytest.raises(NotFound, match="no such blob"):
        await fetcher(session, server.port).fetch(unknown, tmp_path / "model")
    async with open_session("ferryd_wrong") as stranger:
        with pytest.raises(Unauthenticated, match="token"):
            await fetcher(stranger, server.port).fetch(server.add(DATA), tmp_path / "model")

    async def overloaded(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, text="<html>busy</html>")

    server.misbehave = overloaded
    with pytest.raises(Unavailable, match="503"):
        await fetcher(session, server.port).fetch(server.add(DATA), tmp_path / "model")


async def test_a_full_disk_keeps_what_came_and_says_so(server: BlobServer, session: Session, tmp_path: Path) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    partial_path(ref, destination).symlink_to("/dev/full")  # a device that really answers ENOSPC

    with pytest.raises(StorageFull) as full:
        await fetcher(session, server.port).fetch(ref, destination)

    assert full.value.__cause__ is not None
    assert getattr(full.value.__cause__, "errno", None) == errno.ENOSPC
    assert partial_path(ref, destination).is_symlink()


async def test_a_rate_limit_holds_the_download_back(server: BlobServer, session: Session, tmp_path: Path) -> None:
    ref = server.add(DATA)
    slow = asyncio.create_task(fetcher(session, server.port, rate_bytes_per_s=2_000_000).fetch(ref, tmp_path / "slow"))
    await fetcher(session, server.port).fetch(ref, tmp_path / "fast")

    assert not slow.done()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow


async def test_a_cancelled_download_can_be_resumed(server: BlobServer, session: Session, tmp_path: Path) -> None:
    ref, destination = server.add(DATA), tmp_path / "model"
    slow = asyncio.create_task(fetcher(session, server.port, rate_bytes_per_s=2_000_000).fetch(ref, destination))
    partial = partial_path(ref, destination)
    await eventually(lambda: partial.exists() and partial.stat().st_size > 500_000, "half a megabyte on the disk")
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)

    transfer = await fetcher(session, server.port).fetch(ref, destination)

    assert transfer.resumed_bytes > 500_000
    assert hashlib.sha256(destination.read_bytes()).hexdigest() == hex_of(ref.digest)


async def test_only_the_ranges_that_are_wanted_are_fetched_into_one_file(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref, destination = server.add(DATA), tmp_path / "pieces"
    transfer = await fetcher(session, server.port).fetch(ref, destination, ranges=RANGES)
    assert destination.read_bytes() == PIECES
    assert (transfer.bytes, transfer.resumed_bytes) == (len(PIECES), 0)
    assert server.ranges == ["bytes=10-19", "bytes=500000-1499999", "bytes=2900000-"]
    assert files_in(tmp_path) == ["pieces"]
    again = await fetcher(session, server.port).fetch(ref, destination, ranges=RANGES)
    assert (again.bytes, again.resumed_bytes, len(server.ranges)) == (0, len(PIECES), 3)


@pytest.mark.parametrize("kept", [4, 10, 600_000, 1_000_010, len(PIECES)])
async def test_ranges_go_on_at_the_byte_where_they_stopped(
    server: BlobServer, session: Session, tmp_path: Path, kept: int
) -> None:
    ref, destination = server.add(DATA), tmp_path / "pieces"
    partial_path(ref, destination, RANGES).write_bytes(PIECES[:kept])
    transfer = await fetcher(session, server.port).fetch(ref, destination, ranges=RANGES)
    assert destination.read_bytes() == PIECES
    assert (transfer.bytes, transfer.resumed_bytes) == (len(PIECES) - kept, kept)


async def test_ranges_that_come_wrong_are_refused_and_nothing_is_kept(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    ref = server.add(DATA)
    server.blobs[ref.digest] = DATA[:600_000] + b"!" + DATA[600_001:]
    with pytest.raises(IntegrityFailure):
        await fetcher(session, server.port).fetch(ref, tmp_path / "pieces", ranges=RANGES)
    assert files_in(tmp_path) == []


async def test_a_server_that_ignores_range_is_of_no_use_for_ranges(
    server: BlobServer, session: Session, tmp_path: Path
) -> None:
    async def whole(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=DATA)

    ref, moved = server.add(DATA), list[int]()
    server.misbehave = whole
    with pytest.raises(IntegrityFailure, match="whole file"):
        await fetcher(session, server.port).fetch(
            ref, tmp_path / "pieces", lambda so_far, _: moved.append(so_far), ranges=RANGES
        )
    assert moved == []
