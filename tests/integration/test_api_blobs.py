"""Blobs over HTTP: streamed in, checked, and served in parts as RFC 9110 says."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from common.artifact import digest_of
from tests.conftest import eventually
from tests.integration.api_peer import BLOB_BYTES_MAX, ApiPeer, serving

DATA = bytes(range(256)) * 4
SIZE = len(DATA)
DIGEST = digest_of(DATA)
ETAG = f'"{DIGEST}"'
PATH = f"/v1/blobs/{DIGEST}"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiPeer]:
    async with serving(tmp_path) as peer:
        yield peer


def incoming(api: ApiPeer) -> list[Path]:
    return list((api.folder / "blobs/incoming").iterdir())


async def test_a_blob_comes_back_as_it_was_sent(api: ApiPeer) -> None:
    first = await api.ask("PUT", PATH, data=DATA)
    again = await api.ask("PUT", PATH, data=DATA)
    got = await api.ask("GET", PATH)
    assert (first.status, again.status) == (201, 200)
    assert first.json() == {"digest": DIGEST, "size": SIZE}
    assert (got.status, got.body, got.headers["ETag"]) == (200, DATA, ETAG)


async def test_an_upload_is_audited_once_and_known_to_the_store(api: ApiPeer) -> None:
    await api.upload(DATA)
    await api.upload(DATA)
    entries = (await api.ask("GET", "/v1/audit")).json()["items"]
    known = await api.store.read(lambda tx: tx.artifacts.get(DIGEST))
    assert [(entry["action"], entry["subject"]) for entry in entries] == [("blob.upload", DIGEST)]
    assert known is not None
    assert known.size == SIZE


async def test_bytes_that_do_not_hash_to_their_name_are_refused_and_not_kept(api: ApiPeer) -> None:
    reply = await api.ask("PUT", PATH, data=DATA + b"!")
    problem = reply.problem()
    assert (reply.status, problem["code"], problem["field"]) == (400, "invalid_input", "digest")
    assert problem["fix"]
    assert (await api.ask("GET", PATH)).status == 404
    assert incoming(api) == []


async def test_an_upload_that_breaks_off_leaves_nothing(api: ApiPeer) -> None:
    where = urlsplit(api.url)
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    head = f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token}\r\nContent-Length: {SIZE}\r\n\r\n"
    writer.write(head.encode() + DATA[: SIZE // 2])
    await writer.drain()
    await eventually(lambda: incoming(api), "the upload begins")
    writer.close()
    await eventually(lambda: not incoming(api), "the unfinished file is removed")
    assert (await api.ask("GET", PATH)).status == 404


async def test_an_upload_that_is_shorter_than_its_digest_says_is_refused(api: ApiPeer) -> None:
    assert (await api.ask("PUT", PATH, data=DATA[:-1])).problem()["field"] == "digest"


async def test_more_than_the_limit_is_refused_whether_announced_or_not(api: ApiPeer) -> None:
    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(BLOB_BYTES_MAX // 65_536 + 1):
            yield bytes(65_536)

    announced = await api.ask("PUT", PATH, data=bytes(BLOB_BYTES_MAX + 1))
    streamed = await api.ask("PUT", PATH, data=unannounced())
    assert [reply.problem()["code"] for reply in (announced, streamed)] == ["too_large", "too_large"]
    assert incoming(api) == []


async def test_two_uploads_of_the_same_blob_at_once_both_succeed(api: ApiPeer) -> None:
    replies = await asyncio.gather(*(api.ask("PUT", PATH, data=DATA) for _ in range(4)))
    assert {reply.status for reply in replies} <= {200, 201}
    assert (await api.ask("GET", PATH)).body == DATA


@pytest.mark.parametrize(
    ("wanted", "content_range", "part"),
    [
        ("bytes=0-0", f"bytes 0-0/{SIZE}", DATA[:1]),
        ("bytes=10-19", f"bytes 10-19/{SIZE}", DATA[10:20]),
        ("bytes=1000-", f"bytes 1000-{SIZE - 1}/{SIZE}", DATA[1000:]),
        ("bytes=-24", f"bytes {SIZE - 24}-{SIZE - 1}/{SIZE}", DATA[-24:]),
        ("bytes=1000-999999", f"bytes 1000-{SIZE - 1}/{SIZE}", DATA[1000:]),
        ("BYTES=-999999", f"bytes 0-{SIZE - 1}/{SIZE}", DATA),
    ],
)
async def test_a_range_gives_that_part(api: ApiPeer, wanted: str, content_range: str, part: bytes) -> None:
    await api.upload(DATA)
    reply = await api.ask("GET", PATH, headers={"Range": wanted})
    assert (reply.status, reply.headers["Content-Range"], reply.body) == (206, content_range, part)
    assert reply.headers["ETag"] == ETAG


@pytest.mark.parametrize("wanted", ["bytes=9-3", "bytes=", "bytes=-", "items=0-1", "bytes=0-1,5-6", "bytes=a-b"])
async def test_what_is_no_single_byte_range_gives_the_whole(api: ApiPeer, wanted: str) -> None:
    await api.upload(DATA)
    reply = await api.ask("GET", PATH, headers={"Range": wanted})
    assert (reply.status, reply.body) == (200, DATA)


@pytest.mark.parametrize("wanted", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
async def test_a_range_past_the_end_is_416_and_tells_the_size(api: ApiPeer, wanted: str) -> None:
    await api.upload(DATA)
    reply = await api.ask("GET", PATH, headers={"Range": wanted})
    assert (reply.status, reply.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
    assert reply.problem()["field"] == "Range"


@pytest.mark.parametrize("known", [ETAG, f"W/{ETAG}", f'"other", {ETAG}', "*"])
async def test_who_has_it_already_gets_304_even_when_asking_for_a_range(api: ApiPeer, known: str) -> None:
    await api.upload(DATA)
    reply = await api.ask("GET", PATH, headers={"If-None-Match": known, "Range": "bytes=0-1"})
    assert (reply.status, reply.body, reply.headers["ETag"]) == (304, b"", ETAG)


@pytest.mark.parametrize(
    ("validator", "status"),
    [(ETAG, 206), ('"other"', 200), (f"W/{ETAG}", 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)],
)
async def test_if_range_resumes_only_the_very_same_bytes(api: ApiPeer, validator: str, status: int) -> None:
    await api.upload(DATA)
    reply = await api.ask("GET", PATH, headers={"Range": "bytes=5-", "If-Range": validator})
    assert reply.status == status
    assert reply.body == (DATA[5:] if status == 206 else DATA)


async def test_a_stale_if_range_hides_even_an_impossible_range(api: ApiPeer) -> None:
    await api.upload(DATA)
    reply = await api.ask("GET", PATH, headers={"Range": "bytes=999999-", "If-Range": '"other"'})
    assert (reply.status, reply.body) == (200, DATA)


async def test_head_tells_the_size_and_knows_no_ranges(api: ApiPeer) -> None:
    await api.upload(DATA)
    reply = await api.ask("HEAD", PATH, headers={"Range": "bytes=0-1"})
    assert (reply.status, reply.headers["Content-Length"], reply.body) == (200, str(SIZE), b"")


async def test_an_empty_blob_can_be_had(api: ApiPeer) -> None:
    empty = f"/v1/blobs/{await api.upload(b'')}"
    whole, part = await api.ask("GET", empty), await api.ask("GET", empty, headers={"Range": "bytes=0-"})
    assert (whole.status, whole.body, part.status) == (200, b"", 416)


async def test_a_device_may_read_blobs_and_not_write_them(api: ApiPeer) -> None:
    token = (await api.join("cam-1")).device_token
    await api.upload(DATA)
    assert (await api.ask("GET", PATH, token=token)).body == DATA
    assert (await api.ask("PUT", PATH, data=DATA, token=token)).problem()["code"] == "forbidden"


async def test_a_blob_that_vanishes_while_it_is_sent_breaks_the_connection_off(api: ApiPeer) -> None:
    big = bytes(BLOB_BYTES_MAX)
    digest = await api.upload(big)
    where = urlsplit(api.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=4096)
    writer.write(f"GET /v1/blobs/{digest} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    api.blobs.remove(digest)
    received = 0
    try:
        while data := await reader.read(65_536):
            assert b"problem" not in data
            received += len(data)
    except ConnectionError:
        pass
    writer.close()
    assert head.startswith(b"HTTP/1.1 200")
    assert received < len(big)
