"""The device's inference API: Open Inference Protocol V2 over HTTP, for applications on the device.

Any V2 client works (`tritonclient`, `curl`); docs/reference/inference-api.md is the reference. Errors are
`{"error": "..."}` and name the tensor and what was expected. What runs is the fleet's decision; only models that the
device's owner has loaded on demand can be loaded and unloaded here. There is no authentication, so listen on loopback
or on a Unix socket unless the network is trusted.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from common.errors import Forbidden, InvalidInput
from common.ids import ModelName, Version
from edge_agent.inference import descriptions
from edge_agent.inference.asgi import Application, Bodies, BodyLimits, Call, Overfull, Reply, document, packed
from edge_agent.inference.labels import LABELS_MAX, Label, Labels
from edge_agent.inference.protocol import InferRequest, decode_request, encode_response
from edge_agent.inference.requests import Inference, Terms
from edge_agent.inference.serving import ModelServer, Served
from edge_agent.inference.sides import NO_WISH, Wish, wish_in

COMPRESS_BYTES_MIN: Final = 1024
"""Shorter answers are not worth compressing."""
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_HEADER_LENGTH: Final = HEADER_LENGTH.lower().encode()
ANSWERED_BY: Final = "Ferry-Answered-By"
"""`MODEL@VERSION` of the release that gave the answer."""
CACHE: Final = "Ferry-Cache"
"""`hit` on an answer that was given before, to an equal request."""
_JSON: Final = (b"content-type", b"application/json")
_BINARY: Final = (b"content-type", b"application/octet-stream")


def inference_app(
    server: ModelServer,
    status: Callable[[], dict[str, Any]] | None = None,
    limits: BodyLimits | None = None,
    labels: Labels | None = None,
) -> Application:
    """The application that serves `server`'s models; `GET /status` answers what `status` returns, if given, and answers
    can be labelled where there are `labels`.
    """
    return _Api(server, status, limits or BodyLimits(), labels).application()


class GivenLabels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request to label answers."""

    labels: Annotated[tuple[Label, ...], Meta(min_length=1, max_length=LABELS_MAX)]


class _Api:
    """The handlers."""

    def __init__(
        self,
        server: ModelServer,
        status: Callable[[], dict[str, Any]] | None,
        limits: BodyLimits,
        labels: Labels | None,
    ) -> None:
        self._labels = labels
        self._server = server
        self._status = status
        self._bodies = Bodies(limits)

    def application(self) -> Application:
        application = Application()
        add = application.add
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            add("POST", f"{model}/infer", self.infer)
            if self._labels:
                add("POST", f"{model}/labels", self.label)
            add("GET", model, self.metadata)
            add("GET", f"{model}/ready", self.model_ready)
            add("GET", f"{model}/config", self.config)
            add("GET", f"{model}/stats", self.statistics)
        add("GET", "/v2/models/stats", self.statistics)
        add("GET", "/v2", self.server_metadata)
        add("GET", "/v2/health/live", self.live)
        add("GET", "/v2/health/ready", self.ready)
        add("POST", "/v2/repository/index", self.index)
        for verb in ("load", "unload"):
            add("POST", f"/v2/repository/models/{{model}}/{verb}", self.move)
        if self._status:
            add("GET", "/status", self.status)
        return application

    async def infer(self, call: Call) -> Reply:
        """One inference."""
        model, version = _named(call)
        self._server.require(model, version)  # an unknown model is refused before its body is read
        try:
            body = await self._bodies.read(call)
        except Overfull:
            self._server.turned_away(model, version)
            raise
        try:
            parsed = decode_request(body, _header_length(call))
            answer = await self._server.infer(
                model,
                version,
                parsed.feeds,
                parsed.outputs,
                Terms(parsed.priority, parsed.timeout_s, parsed.parameters, self._wish(model, call, parsed)),
            )
        finally:
            self._bodies.release(len(body))
        if self._labels:  # before the caller can label it
            self._labels.remember(model, parsed.id, answer)
        encoded = encode_response(answer.model, answer.version, parsed, answer.outputs)
        headers = (*_form(encoded.header_length), *_origin(answer))
        reply = Reply(encoded.data, 200, headers)
        coding = _wanted_coding(call)
        if coding and len(encoded.data) >= COMPRESS_BYTES_MIN:
            headers = (*reply.headers, (b"content-encoding", coding.encode()))
            reply = Reply(packed(encoded.data, coding), 200, headers)
        return reply

    async def label(self, call: Call) -> Reply:
        """The true labels of earlier answers."""
        model, version = _named(call)
        body = await self._bodies.read(call)
        try:
            given = msgspec.json.decode(body, type=GivenLabels).labels
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fix = 'send {"labels": [{"id": "...", "label": 3}]}'
            raise InvalidInput(f"these are no labels: {error}", field="labels", fix=fix) from error
        finally:
            self._bodies.release(len(body))
        if self._labels is None:
            raise AssertionError("labels without a memory")
        return document(self._labels.label(model, version, given))

    async def metadata(self, call: Call) -> Reply:
        model, version = _named(call)
        served = self._server.served(model, version)
        versions = [one.version for one in self._all(model)]
        return document(descriptions.model_metadata(served, versions, self._server.platform))

    async def model_ready(self, call: Call) -> Reply:
        served = self._server.served(*_named(call))
        return document({"name": served.model, "ready": True})

    async def config(self, call: Call) -> Reply:
        served = self._server.served(*_named(call))
        return document(descriptions.model_config(served, self._server.platform))

    async def statistics(self, call: Call) -> Reply:
        if "model" not in call.named:
            return document(descriptions.model_statistics(self._server.models() + self._server.shadows()))
        model, version = _named(call)
        shadows = [one for one in self._server.shadows() if one.model == model]
        chosen = [one for one in shadows if one.version == version]
        if not chosen:
            chosen = [self._server.served(model, version)] if version else [*self._all(model), *shadows]
        return document(descriptions.model_statistics(chosen))

    async def server_metadata(self, _: Call) -> Reply:
        return document(descriptions.server_metadata())

    async def live(self, _: Call) -> Reply:
        return document({"live": True})

    async def ready(self, _: Call) -> Reply:
        # The protocol says 4xx for "no", not 503.
        return document({"ready": self._server.ready}, 200 if self._server.ready else 400)

    async def index(self, _: Call) -> Reply:
        return document(descriptions.repository_index(self._server.models()))

    async def move(self, call: Call) -> Reply:
        """Into memory or out of it, for models that are loaded on demand; all else is the fleet's."""
        model, verb = ModelName(call.named["model"]), call.path.rpartition("/")[2]
        if self._server.may_rest(model):
            served = self._server.served(model)
            if verb == "load" and not served.in_memory:
                await self._server.waking.awake(model, None)
            elif verb == "unload" and served.in_memory and not served.probation:
                await self._server.rest(model)
            return document({})
        fix = "change what the device should run with a rollout"
        raise Forbidden(f"cannot {verb} {model[:80]!r} here: the fleet's controller decides", fix=fix)

    async def status(self, _: Call) -> Reply:
        return document(self._status() if self._status else {})

    def _wish(self, model: ModelName, call: Call, parsed: InferRequest) -> Wish:
        """Who shall answer, from the header or the parameter that the order names, where requests are split."""
        split = self._server.split(model)
        if split is None:
            return NO_WISH
        return wish_in(split, lambda name: call.header(name.lower().encode()) or str(parsed.parameters.get(name, "")))

    def _all(self, model: ModelName) -> Sequence[Served]:
        self._server.served(model)
        return [one for one in self._server.models() if one.model == model]


def _named(call: Call) -> tuple[ModelName, Version | None]:
    """The model and version in the path. They are only looked up, so their grammar does not matter."""
    version = call.named.get("version")
    return ModelName(call.named["model"]), Version(version) if version else None


def _form(header_length: int | None) -> tuple[tuple[bytes, bytes], ...]:
    if header_length is None:
        return (_JSON,)
    return _BINARY, (_HEADER_LENGTH, str(header_length).encode())


def _origin(answer: Inference) -> tuple[tuple[bytes, bytes], ...]:
    """Who answered, and whether from memory."""
    release = f"{answer.model}@{answer.version}".encode("ascii", "replace")
    hit = ((CACHE.lower().encode(), b"hit"),) if answer.recalled else ()
    return ((ANSWERED_BY.lower().encode(), release), *hit)


def _header_length(call: Call) -> int | None:
    text = call.header(_HEADER_LENGTH)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        fix = "send the length of the JSON part"
        raise InvalidInput(f"{text[:40]!r} is not a length", field=HEADER_LENGTH, fix=fix)
    return int(text)


def _wanted_coding(call: Call) -> str | None:
    """How to compress the answer: only if the caller names exactly one coding, as V2 clients do when they mean it.

    Most HTTP libraries offer a list in every request; on loopback compressing would cost them more than it saves.
    """
    wish = call.header(b"accept-encoding").strip().lower()
    return wish if wish in ("gzip", "deflate") else None
