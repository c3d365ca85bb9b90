"""A small, faithful server of `GET /v1/blobs/{digest}` and of a device's twin, for tests of the agent alone.

Range, If-Range-free 206, 416 and 401 as the controller answers them; `misbehave` replaces an answer for a test.
"""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.test_utils import TestServer

from common.artifact import ArtifactRef, digest_of
from common.ids import Digest

TOKEN = "ferryd_a-secret"

Misbehaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


class BlobServer:
    """Serves what `add` was given, on a free port; `ranges` are the Range headers that came."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.ranges: list[str] = []
        self.misbehave: Misbehaviour | None = None
        self.order: tuple[bytes, str] | None = None
        self.reports: list[bytes] = []
        application = web.Application()
        application.router.add_get("/v1/blobs/{digest}", self._blob)
        application.router.add_get("/v1/devices/{device}/desired", self._desired)
        application.router.add_put("/v1/devices/{device}/reported", self._reported)
        self._server = TestServer(application, host="127.0.0.1")

    async def __aenter__(self) -> Self:
        await self._server.start_server()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.close()

    @property
    def port(self) -> int:
        assert self._server.port is not None
        return self._server.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, data: bytes) -> ArtifactRef:
        ref = ArtifactRef(digest_of(data), len(data))
        self.blobs[ref.digest] = data
        return ref

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        self.ranges.append(request.headers.get("Range", ""))
        if refusal := _refusal(request):
            return refusal
        if self.misbehave is not None:
            return await self.misbehave(request)
        data = self.blobs.get(Digest(request.match_info["digest"]))
        if data is None:
            return problem(404, "there is no such blob")
        start = request.http_range.start or 0
        if "Range" not in request.headers:
            return web.Response(body=data)
        if start >= len(data):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
        body = data[request.http_range]
        content_range = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        return web.Response(status=206, body=body, headers={"Content-Range": content_range})

    async def _desired(self, request: web.Request) -> web.StreamResponse:
        if refusal := _refusal(request):
            return refusal
        if self.order is None:
            return problem(404, "there is no order for this device")
        data, etag = self.order
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        return web.Response(body=data, headers={"ETag": etag})

    async def _reported(self, request: web.Request) -> web.StreamResponse:
        if refusal := _refusal(request):
            return refusal
        self.reports.append(await request.read())
        return web.Response(status=204)


def problem(status: int, detail: str) -> web.Response:
    return web.json_response({"detail": detail}, status=status, content_type="application/problem+json")


def _refusal(request: web.Request) -> web.Response | None:
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        return problem(401, "the token is not known")
    return None
