"""The device's inference API: Open Inference Protocol V2 over HTTP, for applications on the device.

Any V2 client works (`tritonclient`, `curl`); docs/reference/inference-api.md is the reference. Errors are
`{"error": "..."}` and name the tensor and what was expected. Models cannot be loaded or unloaded here: the fleet
decides. There is no authentication, so listen on loopback unless the network is trusted.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from common.errors import FerryError, Forbidden, InvalidInput, NotFound, TooLarge, Unavailable
from common.ids import ModelName, Version
from edge_agent.inference import descriptions
from edge_agent.inference.protocol import decode_request, encode_error, encode_response
from edge_agent.inference.requests import DeadlineExceeded, Overloaded
from edge_agent.inference.serving import ModelServer, Served

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
COMPRESS_BYTES_MIN = 1024
"""Shorter answers are not worth compressing."""
JSON = "application/json"
HEADER_LENGTH = "Inference-Header-Content-Length"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_STATUS: tuple[tuple[type[FerryError], int], ...] = (
    (TooLarge, 413),
    (InvalidInput, 400),
    (NotFound, 404),
    (Forbidden, 403),
    (DeadlineExceeded, 504),
    (Unavailable, 503),
    (FerryError, 500),
)


class HttpLimits(msgspec.Struct, frozen=True):
    """How much a caller may ask for."""

    body_bytes_max: int = 32 * 1024 * 1024
    """One request body, after decompression."""
    bodies_bytes_max: int = 256 * 1024 * 1024
    """All request bodies that are in memory at one time."""


def inference_app(
    server: ModelServer, status: Callable[[], dict[str, Any]] | None = None, limits: HttpLimits | None = None
) -> web.Application:
    """The application that serves `server`'s models; `GET /status` answers what `status` returns, if given."""
    return _Api(server, status, limits or HttpLimits()).application()


async def serve(application: web.Application, host: str, port: int) -> tuple[web.AppRunner, str]:
    """Listen, on a free port if `port` is 0. Returns the runner (`await runner.cleanup()` ends it) and the URL."""
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}", fix="choose another port") from error
    bound = runner.addresses[0]
    return runner, f"http://{f'[{host}]' if ':' in host else host}:{bound[1]}"


class _Api:
    """The handlers, and how many bytes of request bodies they hold."""

    def __init__(self, server: ModelServer, status: Callable[[], dict[str, Any]] | None, limits: HttpLimits) -> None:
        self._server = server
        self._status = status
        self._limits = limits
        self._held = 0

    def application(self) -> web.Application:
        application = web.Application(middlewares=[_errors_as_documents])
        add = application.router.add_route
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            add("POST", f"{model}/infer", self.infer)  # first: routes are tried in this order
        add("GET", "/v2/models/stats", self.statistics)
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            add("GET", model, self.metadata)
            add("GET", f"{model}/ready", self.model_ready)
            add("GET", f"{model}/config", self.config)
            add("GET", f"{model}/stats", self.statistics)
        add("GET", "/v2", self.server_metadata)
        add("GET", "/v2/health/live", self.live)
        add("GET", "/v2/health/ready", self.ready)
        add("POST", "/v2/repository/index", self.index)
        add("POST", "/v2/repository/models/{model}/{verb:load|unload}", self.refuse)
        if self._status:
            add("GET", "/status", self.status)
        return application

    async def infer(self, request: web.Request) -> web.Response:
        """One inference."""
        model, version = _named(request)
        self._server.served(model, version)  # an unknown model is refused before its body is read
        body = await self._read(request)
        try:
            parsed = decode_request(body, _header_length(request))
            answer = await self._server.infer(model, version, parsed.feeds, parsed.outputs)
        finally:
            self._held -= len(body)
        encoded = encode_response(model, answer.version, parsed, answer.outputs)
        if encoded.header_length is None:
            response = web.Response(body=encoded.data, content_type=JSON)
        else:
            response = web.Response(body=encoded.data, headers={HEADER_LENGTH: str(encoded.header_length)})
        coding = _wanted_coding(request)
        if coding and len(encoded.data) >= COMPRESS_BYTES_MIN:
            response.enable_compression(coding)
        return response

    async def metadata(self, request: web.Request) -> web.Response:
        model, version = _named(request)
        served = self._server.served(model, version)
        versions = [one.version for one in self._all(model)]
        return _document(descriptions.model_metadata(served, versions, self._server.platform))

    async def model_ready(self, request: web.Request) -> web.Response:
        served = self._server.served(*_named(request))
        return _document({"name": served.model, "ready": True})

    async def config(self, request: web.Request) -> web.Response:
        served = self._server.served(*_named(request))
        return _document(descriptions.model_config(served, self._server.platform))

    async def statistics(self, request: web.Request) -> web.Response:
        if "model" not in request.match_info:
            return _document(descriptions.model_statistics(self._server.models()))
        model, version = _named(request)
        chosen = [self._server.served(model, version)] if version else self._all(model)
        return _document(descriptions.model_statistics(chosen))

    async def server_metadata(self, _: web.Request) -> web.Response:
        return _document(descriptions.server_metadata())

    async def live(self, _: web.Request) -> web.Response:
        return _document({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        # The protocol says 4xx for "no", not 503.
        return _document({"ready": self._server.ready}, 200 if self._server.ready else 400)

    async def index(self, _: web.Request) -> web.Response:
        return _document(descriptions.repository_index(self._server.models()))

    async def refuse(self, request: web.Request) -> web.Response:
        model, verb = request.match_info["model"], request.match_info["verb"]
        fix = "change what the device should run with a rollout"
        raise Forbidden(f"cannot {verb} {model[:80]!r} here: the fleet's controller decides", fix=fix)

    async def status(self, _: web.Request) -> web.Response:
        return _document(self._status() if self._status else {})

    def _all(self, model: ModelName) -> Sequence[Served]:
        self._server.served(model)
        return [one for one in self._server.models() if one.model == model]

    async def _read(self, request: web.Request) -> bytes:
        """The whole body, decompressed. The caller gives its length back to `self._held`."""
        self._check_size(request.content_length or 0)
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in request.content.iter_any():
                chunks.append(chunk)
                size += len(chunk)
                self._held += len(chunk)
                self._check_size(size)
        except BaseException:
            self._held -= size
            raise
        return b"".join(chunks)

    def _check_size(self, size: int) -> None:
        limit = self._limits.body_bytes_max
        if size > limit:
            raise TooLarge("the request body is too large", field="body", fix=f"send at most {limit} bytes")
        if self._held > self._limits.bodies_bytes_max:
            raise Overloaded("too many large requests at once", fix="try again a little later")


@web.middleware
async def _errors_as_documents(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error, also the router's, in the protocol's form."""
    try:
        return await handler(request)
    except FerryError as error:
        return _error(error)
    except web.HTTPException as error:
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        known = f"{request.method} {request.path[:200]}: {error.reason}"
        return web.json_response({"error": known}, status=error.status, headers=headers)
    except web.RequestPayloadError as error:
        reason = " ".join(str(error).split())
        broken = _error(InvalidInput(f"the body cannot be read: {reason}", field="body", fix="check its encoding"))
        broken.force_close()  # where the next request begins is anybody's guess
        return broken
    except Exception:
        logger.exception("inference request failed")
        return web.json_response({"error": "internal error; the agent's log has the details"}, status=500)


def _error(error: FerryError) -> web.Response:
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return web.Response(body=encode_error(error), status=status, content_type=JSON, headers=headers)


def _document(document: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), status=status, content_type=JSON)


def _named(request: web.Request) -> tuple[ModelName, Version | None]:
    """The model and version in the path. They are only looked up, so their grammar does not matter."""
    version = request.match_info.get("version")
    return ModelName(request.match_info["model"]), Version(version) if version else None


def _header_length(request: web.Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise InvalidInput(
            f"{text[:40]!r} is not a length", field=HEADER_LENGTH, fix="send the length of the JSON part"
        )
    return int(text)


def _wanted_coding(request: web.Request) -> web.ContentCoding | None:
    """How to compress the answer: only if the caller names exactly one coding, as V2 clients do when they mean it.

    Most HTTP libraries offer a list in every request; on loopback compressing would cost them more than it saves.
    """
    wish = request.headers.get("Accept-Encoding", "").strip().lower()
    return web.ContentCoding(wish) if wish in ("gzip", "deflate") else None
