"""`POST .../infer`: a V2 request in, a V2 answer out, on whatever threads they are on.

The thread that has read a request runs it if a core is free, and whoever has the answer encodes and sends it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeVar

from common.errors import FerryError, InvalidInput
from common.ids import ModelName, Version
from edge_agent.inference.bodies import packed
from edge_agent.inference.labels import Labels
from edge_agent.inference.protocol import InferRequest
from edge_agent.inference.repeated import Repeated
from edge_agent.inference.requests import Ask, Inference, Terms
from edge_agent.inference.serving import ModelServer
from edge_agent.inference.sides import NO_WISH, Wish, wish_in
from edge_agent.inference.web import Answerer, Call, Reply, reply_to

COMPRESS_BYTES_MIN: Final = 1024
"""Shorter answers are not worth compressing."""
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_HEADER_LENGTH: Final = HEADER_LENGTH.lower().encode()
ANSWERED_BY: Final = "Ferry-Answered-By"
"""`MODEL@VERSION` of the release that gave the answer."""
CACHE: Final = "Ferry-Cache"
"""`hit` on an answer that was given before, to an equal request."""
HEADERS_MAX: Final = 256
"""Combinations of an answer's headers that are remembered."""
_JSON: Final = (b"content-type", b"application/json")
_BINARY: Final = (b"content-type", b"application/octet-stream")


T = TypeVar("T")


class Infer:
    """The route; see `Direct`."""

    def __init__(self, server: ModelServer, labels: Labels | None) -> None:
        self.server = server
        self.labels = labels
        self.repeated = Repeated()

    def begin(self, call: Call) -> None:
        """An unknown model is refused before its body is read."""
        self.server.require(*named(call))

    def overfull(self, call: Call) -> None:
        """Counted like a request for which the queue has no room."""
        self.server.turned_away(*named(call))

    def answer(self, call: Call, to: Answerer) -> object | None:
        """See `Direct.answer`."""
        model, version = named(call)
        parsed = self.repeated.decode(call.body, _known(call, "header length", _header_length))
        terms = Terms(parsed.priority, parsed.timeout_s, parsed.parameters, self._wish(model, call, parsed))
        caller = _Caller(self, model, call, parsed, to)
        return self.server.deliver(Ask(model, version, parsed.feeds, parsed.outputs, terms), caller)

    def _wish(self, model: ModelName, call: Call, parsed: InferRequest) -> Wish:
        """Who shall answer, from the header or the parameter that the order names, where requests are split."""
        split = self.server.split(model)
        if split is None:
            return NO_WISH
        return wish_in(split, lambda name: call.header(name.lower().encode()) or str(parsed.parameters.get(name, "")))


class _Caller:
    """Takes the outcome of one request to the one who sends it."""

    __slots__ = ("_answered", "_call", "_model", "_parsed", "_route", "_to", "waits")

    def __init__(self, route: Infer, model: ModelName, call: Call, parsed: InferRequest, to: Answerer) -> None:
        self._route = route
        self._model = model
        self._call = call
        self._parsed = parsed
        self._to = to
        self._answered = False
        self.waits = to.waits

    def done(self) -> bool:
        return self._answered

    def set_result(self, answer: Inference) -> None:
        try:
            reply = self._encoded(answer)
        except Exception as error:  # noqa: BLE001 (whatever it is, the caller gets an answer)
            reply = reply_to(error)
        self._send(reply)

    def set_exception(self, error: FerryError) -> None:
        self._send(reply_to(error))

    def _send(self, reply: Reply) -> None:
        self._answered = True  # before: another request may wait for its answer there as soon as this one is sent
        self._to.send(reply)

    def _encoded(self, answer: Inference) -> Reply:
        if self._route.labels:  # before the caller can label it
            self._route.labels.remember(self._model, self._parsed.id, answer)
        data, header_length = self._route.repeated.encode(answer.model, answer.version, self._parsed, answer.outputs)
        headers = _headers(header_length, answer.model, answer.version, answer.recalled)
        coding = _known(self._call, "coding", _wanted_coding)
        if coding and len(data) >= COMPRESS_BYTES_MIN:
            return Reply(packed(data, coding), 200, (*headers, (b"content-encoding", coding.encode())))
        return Reply(data, 200, headers)


def named(call: Call) -> tuple[ModelName, Version | None]:
    """The model and version in the path. They are only looked up, so their grammar does not matter."""
    version = call.named.get("version")
    return ModelName(call.named["model"]), Version(version) if version else None


def _known(call: Call, what: str, find: Callable[[Call], T]) -> T:
    """What `find` says of the call's head, now or when an equal one came before."""
    if what not in call.memo:
        call.memo[what] = find(call)
    known: T = call.memo[what]
    return known


@lru_cache(HEADERS_MAX)
def _headers(
    header_length: int | None, model: ModelName, version: Version, recalled: bool
) -> tuple[tuple[bytes, bytes], ...]:
    """Those of an answer: its form, who gave it, and whether from memory."""
    form: tuple[tuple[bytes, bytes], ...] = (_JSON,)
    if header_length is not None:
        form = _BINARY, (_HEADER_LENGTH, str(header_length).encode())
    release = f"{model}@{version}".encode("ascii", "replace")
    hit = ((CACHE.lower().encode(), b"hit"),) if recalled else ()
    return (*form, (ANSWERED_BY.lower().encode(), release), *hit)


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
