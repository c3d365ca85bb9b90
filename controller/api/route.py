"""One decorator for a route: it registers the handler and describes it, from the same signature.

    @route("PATCH", "/v1/devices/{device}", summary="Change a device's labels", roles=("admin",))
    async def relabel(call: Call, device: DeviceId, body: RelabelDevice) -> Answer[DeviceView]: ...

A parameter called `body` is the JSON body, `query` the URL's query, any other one a part of the path, parsed by its
name. The return annotation says what is answered: `Answer[View]` for JSON, a `StreamResponse` for bytes (whose content
type `produces` names). The decorator checks at import that path and signature agree, so the document cannot lie.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web

from common import ids
from common.errors import InvalidInput, PreconditionFailed, Unauthenticated
from controller.api.auth import Actor
from controller.api.conditional import matches_strongly
from controller.api.dependencies import Dependencies
from controller.api.idempotency import Repeat
from controller.store.port import AuditEntry, Event, Role, Token, Transaction

T = TypeVar("T")
H = TypeVar("H", bound=Callable[..., Awaitable[Any]])

JSON = "application/json"
NAME_CHARS_MAX = 64
STREAMING = web.RequestKey("streaming", web.StreamResponse)
"""The answer of a request whose head has been sent."""

MUTATING = frozenset({"POST", "PUT", "PATCH", "DELETE"})


def _parse_name(text: str, field: str) -> str:
    if not text.isascii() or not text.isprintable() or len(text) > NAME_CHARS_MAX:
        raise InvalidInput("is not an id", field=field, fix="copy it from a list")
    return text


PATH_PARSERS: Mapping[str, Callable[[str, str], str]] = {
    "device": ids.parse_device_id,
    "digest": ids.parse_digest,
    "model": ids.parse_model_name,
    "version": ids.parse_version,
    "rollout": _parse_name,
    "token": _parse_name,
}
"""How each path parameter is parsed; the name of a parameter is its meaning, in every route."""


class Answer(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A JSON answer; None becomes 204 without a body. `etag` is the quoted tag, `status` overrides the route's."""

    value: T
    status: int | None = None
    etag: str = ""
    headers: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Route:
    """One route as declared. `statuses` are the successful ones, the usual one first."""

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    summary: str
    roles: tuple[Role, ...]
    statuses: tuple[int, ...]
    body: Any = None
    query: type[msgspec.Struct] | None = None
    answer: Any = None
    consumes: str = JSON
    produces: str = JSON
    parameters: tuple[str, ...] = ()

    @property
    def mutates(self) -> bool:
        return self.method in MUTATING


ROUTES: list[Route] = []
"""Every route of the API, in order of declaration."""


def route(
    method: str,
    path: str,
    *,
    summary: str,
    roles: tuple[Role, ...] = ("admin",),
    statuses: tuple[int, ...] = (200,),
    consumes: str = JSON,
    produces: str = JSON,
) -> Callable[[H], H]:
    """Declare a route. No `roles`: no token is asked for. `consumes` not JSON: the handler reads the body."""

    def declare(handler: H) -> H:
        hints = get_type_hints(handler)
        answer = hints.pop("return")
        hints.pop("call")
        parameters = tuple(name for name in hints if name not in {"body", "query"})
        if {f"{{{name}}}" for name in parameters} != {part for part in path.split("/") if part.startswith("{")}:
            raise TypeError(f"{method} {path}: path and signature disagree")
        declared = Route(
            method=method,
            path=path,
            handler=handler,
            summary=summary,
            roles=roles,
            statuses=statuses,
            body=hints.get("body"),
            query=hints.get("query"),
            answer=get_args(answer)[0] if get_origin(answer) is Answer else None,
            consumes=consumes,
            produces=produces,
            parameters=parameters,
        )
        ROUTES.append(declared)
        return handler

    return declare


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request under way: who asks, with what, and the ways to change things properly."""

    request: web.Request
    deps: Dependencies
    actor: Actor | None
    route: Route
    repeat: Repeat | None = None
    now: float = field(default=0.0)

    @property
    def token(self) -> Token:
        """The caller's token; only for routes with roles."""
        if self.actor is None:
            raise Unauthenticated("this needs a token", field="Authorization")
        return self.actor.token

    @property
    def who(self) -> str:
        """The caller's name for the audit log."""
        return self.actor.name if self.actor else "anonymous"

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` on a snapshot of the store."""
        return await self.deps.store.read(work)

    async def write(self, work: Callable[[Transaction], Answer[T]]) -> Answer[T]:
        """Run `work` and keep its answer for repeats, in one unit; a repeat ends here with `Replayed`."""

        def once(tx: Transaction) -> Answer[T]:
            if self.repeat is None:
                return work(tx)
            self.repeat.recall(tx)
            answer = work(tx)
            self.repeat.remember(tx, self.status_of(answer), body_of(answer), answer.etag, self.now)
            return answer

        return await self.deps.store.write(once)

    async def perform(self, act: Callable[[], Awaitable[Answer[T]]]) -> Answer[T]:
        """Like `write`, for an effect that brings its own unit of work and may safely be done twice."""
        repeat = self.repeat
        if repeat is None:
            return await act()
        await self.deps.store.read(repeat.recall)
        answer = await act()
        status, body = self.status_of(answer), body_of(answer)
        await self.deps.store.write(lambda tx: repeat.remember(tx, status, body, answer.etag, self.now))
        return answer

    def status_of(self, answer: Answer[Any]) -> int:
        """The HTTP status that `answer` goes out with."""
        return answer.status or (204 if answer.value is None else self.route.statuses[0])

    def check_unchanged(self, etag: str) -> None:
        """`PreconditionFailed` when the caller sent If-Match and means another state than `etag`."""
        wanted = self.request.headers.get("If-Match")
        if wanted is not None and not matches_strongly(wanted, etag):
            fix = f"read it again and decide anew; it is at {etag} now"
            raise PreconditionFailed("it has changed since you read it", field="If-Match", fix=fix)

    async def stream(self, response: web.StreamResponse) -> None:
        """Send the head of `response`. What fails from here on can only break the connection off."""
        self.request[STREAMING] = response
        await response.prepare(self.request)

    def record(self, tx: Transaction, action: str, subject: str, **detail: object) -> None:
        """Write who did what to what into the audit log."""
        tx.journal.append_audit(AuditEntry(at=self.now, actor=self.who, action=action, subject=subject, detail=detail))

    def announce(self, tx: Transaction, kind: str, subject: str, **data: object) -> None:
        """Tell those who watch."""
        tx.journal.append_event(Event(kind=kind, subject=subject, at=self.now, data=data))


def body_of(answer: Answer[Any]) -> bytes:
    """The bytes that `answer` goes out as."""
    return b"" if answer.value is None else msgspec.json.encode(answer.value)
