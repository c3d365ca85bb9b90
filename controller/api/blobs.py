"""Bytes by digest: upload once, download in parts. The digest is the name, the entity tag and the check.

Any device may read any blob: its name cannot be guessed and is only told in signed orders. The answers never change, so
caches may keep them for ever.
"""

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus

from aiohttp import ClientPayloadError, web

from common.artifact import ArtifactRef
from common.errors import InvalidInput, NotFound, TooLarge, Unavailable
from common.ids import Digest
from controller.api import conditional
from controller.api.conditional import ByteRange
from controller.api.problems import respond
from controller.api.route import Answer, Call, route
from controller.resources import BlobView
from controller.store.port import Transaction

OCTETS = "application/octet-stream"
FOR_EVER = "private, max-age=31536000, immutable"
SEND_BYTES = 512 * 1024
"""How much of a blob is in memory at a time while it is sent."""
RECEIVE_BYTES = 256 * 1024


@route(
    "PUT",
    "/v1/blobs/{digest}",
    summary="Upload a blob; the body must hash to the digest",
    statuses=(201, 200),
    consumes=OCTETS,
)
async def upload(call: Call, digest: Digest) -> Answer[BlobView]:
    """Stream the body into the registry; nothing is kept unless all of it arrived and hashes to `digest`."""
    size_max = call.deps.settings.blob_bytes_max
    announced = call.request.content_length
    if announced is not None and announced > size_max:
        raise TooLarge(f"{announced} bytes", field="body", fix=f"at most {size_max} bytes are accepted")
    body = _received(call.request)
    created = call.deps.blobs.find(digest) is None
    blob = await call.deps.blobs.put(digest, body, size_max)
    async for _ in body:  # a blob that is there is not read again, but a client that still sends wants its answer
        pass
    async with call.deps.blobs.changing:
        if call.deps.blobs.find(digest) is None:
            raise Unavailable("the blob was collected as garbage while it arrived", fix="send it again")
        await call.deps.store.write(lambda tx: _register(call, tx, blob, created))
    return Answer(value=BlobView(digest=blob.digest, size=blob.size), status=201 if created else 200)


def _register(call: Call, tx: Transaction, blob: ArtifactRef, created: bool) -> None:
    tx.artifacts.put(blob, call.now)
    if created:
        call.record(tx, "blob.upload", blob.digest, size=blob.size)


async def _received(request: web.Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.content.iter_chunked(RECEIVE_BYTES):
            yield chunk
    except (ClientPayloadError, ConnectionError, web.RequestPayloadError) as error:
        fix = "send it again; nothing of it was kept"
        raise InvalidInput("the upload broke off before its end", field="body", fix=fix) from error


@route(
    "GET",
    "/v1/blobs/{digest}",
    summary="Download a blob, whole or one byte range of it",
    roles=("admin", "device"),
    statuses=(200, 206, 304),
    produces=OCTETS,
)
async def download(call: Call, digest: Digest) -> web.StreamResponse:
    """RFC 9110: If-None-Match goes before Range, If-Range is compared strongly, 416 tells the size."""
    blob, wanted = _found(call, digest), call.request.headers
    headers = _headers_of(blob)
    if conditional.matches_weakly(wanted.get("If-None-Match"), headers["ETag"]):
        return web.Response(status=304, headers=headers)
    selected = conditional.select_range(wanted.get("Range"), wanted.get("If-Range"), headers["ETag"], blob.size)
    if selected == conditional.UNSATISFIABLE:
        return _past_the_end(blob)
    if selected is None:
        return await _send(call, blob, ByteRange(0, blob.size), HTTPStatus.OK, headers)
    headers["Content-Range"] = selected.content_range(blob.size)
    return await _send(call, blob, selected, HTTPStatus.PARTIAL_CONTENT, headers)


@route(
    "HEAD",
    "/v1/blobs/{digest}",
    summary="Whether a blob is there, and how large it is",
    roles=("admin", "device"),
    statuses=(200, 304),
    produces=OCTETS,
)
async def head(call: Call, digest: Digest) -> web.StreamResponse:
    """The headers of the whole blob; Range means nothing here (RFC 9110, section 14.2)."""
    blob = _found(call, digest)
    headers = _headers_of(blob)
    if conditional.matches_weakly(call.request.headers.get("If-None-Match"), headers["ETag"]):
        return web.Response(status=304, headers=headers)
    return web.Response(headers={**headers, "Content-Length": str(blob.size)}, content_type=OCTETS)


def _found(call: Call, digest: Digest) -> ArtifactRef:
    blob = call.deps.blobs.find(digest)
    if blob is None:
        raise NotFound(f"no blob {digest}", field="digest", fix="upload it with PUT, or check the digest")
    return blob


def _headers_of(blob: ArtifactRef) -> dict[str, str]:
    return {"ETag": conditional.quote(blob.digest), "Accept-Ranges": "bytes", "Cache-Control": FOR_EVER}


def _past_the_end(blob: ArtifactRef) -> web.Response:
    return respond(
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
        "range_not_satisfiable",
        "the range begins past the end",
        field="Range",
        fix=f"ask for a part of the {blob.size} bytes",
        headers={"Content-Range": f"bytes */{blob.size}", "Accept-Ranges": "bytes"},
    )


async def _send(
    call: Call, blob: ArtifactRef, part: ByteRange, status: HTTPStatus, headers: dict[str, str]
) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type = OCTETS
    response.content_length = part.length
    first = await _read(call, blob, part.offset, part.length)
    await call.stream(response)
    await response.write(first)
    sent = len(first)
    while sent < part.length:
        data = await _read(call, blob, part.offset + sent, part.length - sent)
        await response.write(data)
        sent += len(data)
    await response.write_eof()
    return response


async def _read(call: Call, blob: ArtifactRef, offset: int, length_max: int) -> bytes:
    data = await asyncio.to_thread(call.deps.blobs.read, blob.digest, offset, min(SEND_BYTES, length_max))
    if not data and length_max:
        raise Unavailable(f"blob {blob.digest} is shorter than it was", fix="upload it again")
    return data
