"""From an HTTP request to a handler and back: trace, token, role, parsing, errors. The same steps for every route."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from common.errors import FerryError, Forbidden, InvalidInput, TooLarge, Unavailable
from common.observability import context_from
from common.wire import Message, decode
from controller.api.auth import Actor, authenticate, bearer_of
from controller.api.dependencies import Dependencies
from controller.api.idempotency import HEADER, REPLAYED_HEADER, Repeat, Replayed, check_key, request_digest
from controller.api.problems import internal_problem, problem_of, problem_of_http
from controller.api.route import JSON, PATH_PARSERS, STREAMING, Answer, Call, Route, body_of

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def answering_every_error(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A span around the request, and a problem document for whatever goes wrong inside."""
    resource = request.match_info.route.resource
    path = resource.canonical if resource else "unknown"
    context = context_from(request.headers.get("traceparent"))
    attributes = {"http.request.method": request.method, "http.route": path}
    name = f"{request.method} {path}"
    with tracer.start_as_current_span(name, context, SpanKind.SERVER, attributes=attributes) as span:
        response = await _answer(request, handler)
        span.set_attribute("http.response.status_code", response.status)
        if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except FerryError as error:
        return _broken_off(request) or problem_of(error)
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        return problem_of_http(error, request.path)
    except (ConnectionError, TimeoutError) as error:
        return _broken_off(request) or problem_of(Unavailable(f"the connection broke: {type(error).__name__}"))
    except Exception:
        logger.exception("request failed", extra={"method": request.method, "path": request.path})
        return _broken_off(request) or internal_problem()


def _broken_off(request: web.Request) -> web.StreamResponse | None:
    """Cut the connection if the answer has begun: a problem document inside a body would be taken for data."""
    response = request.get(STREAMING)
    if response is not None and request.transport is not None:
        request.transport.abort()
    return response


def serving(route: Route, deps: Dependencies) -> Handler:
    """The aiohttp handler for `route`."""

    async def serve(request: web.Request) -> web.StreamResponse:
        actor = await _authorised(route, deps, request)
        arguments: dict[str, Any] = {name: _path_argument(request, name) for name in route.parameters}
        if actor and actor.role == "device" and arguments.get("device", actor.token.subject) != actor.token.subject:
            raise Forbidden("a device may only speak for itself", field="device", fix="use this device's own token")
        if route.query is not None:
            arguments["query"] = _query(request, route.query)
        raw = await _json_body(request) if route.consumes == JSON and route.mutates else b""
        if route.body is not None:
            arguments["body"] = _body(raw, route.body)
        repeat = _repeat(request, actor, raw) if route.mutates else None
        call = Call(request=request, deps=deps, actor=actor, route=route, repeat=repeat, now=deps.clock.now())
        try:
            result = await route.handler(call, **arguments)
        except Replayed as replay:
            return _replayed(replay)
        return result if isinstance(result, web.StreamResponse) else _response(call, result)

    return serve


async def _authorised(route: Route, deps: Dependencies, request: web.Request) -> Actor | None:
    if not route.roles:
        return None
    actor = await authenticate(deps.store, bearer_of(request), deps.clock.now())
    if actor.role not in route.roles:
        allowed = " or ".join(route.roles)
        raise Forbidden(f"a token of role {actor.role} may not do this", fix=f"use a token of role {allowed}")
    return actor


def _path_argument(request: web.Request, name: str) -> str:
    return PATH_PARSERS[name](request.match_info[name], name)


def _query(request: web.Request, query: type[msgspec.Struct]) -> msgspec.Struct:
    repeated = {name for name in request.query if len(request.query.getall(name)) > 1}
    if repeated:
        raise InvalidInput("is given more than once", field=min(repeated), fix="give it once")
    try:
        return msgspec.convert(dict(request.query), query, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error, "query") from error


async def _json_body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        limit = request.client_max_size
        raise TooLarge("the body is too large", field="body", fix=f"at most {limit} bytes") from error


def _body(raw: bytes, body: Any) -> Any:
    if isinstance(body, type) and issubclass(body, Message):
        return decode(raw, body)
    try:
        return msgspec.json.decode(raw or b"{}", type=body)
    except msgspec.ValidationError as error:
        raise invalid(error, "body") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"not JSON: {error}", field="body", fix="send a JSON object") from error


def invalid(error: msgspec.ValidationError, whole: str) -> InvalidInput:
    """msgspec's "Expected `int`, got `str` - at `$.phases[0].count`" with the path as our field."""
    text, _, path = str(error).partition(" - at `")
    field = path.rstrip("`").removeprefix("$").lstrip(".") or whole
    return InvalidInput(text, field=field, fix="see /v1/openapi.json for what is allowed")


def _repeat(request: web.Request, actor: Actor | None, raw: bytes) -> Repeat | None:
    key = request.headers.get(HEADER)
    if key is None or actor is None:
        return None
    digest = request_digest(request.method, request.path_qs, raw)
    return Repeat(actor.token.id, check_key(key), digest, bearer_of(request))


def _response(call: Call, answer: Answer[Any]) -> web.Response:
    headers = {**answer.headers, "Cache-Control": "no-store"}
    if answer.etag:
        headers["ETag"] = answer.etag
    body = body_of(answer)
    content_type = JSON if body else None
    return web.Response(body=body or None, status=call.status_of(answer), headers=headers, content_type=content_type)


def _replayed(replay: Replayed) -> web.Response:
    headers = {REPLAYED_HEADER: "true", "Cache-Control": "no-store"}
    if replay.etag:
        headers["ETag"] = replay.etag
    content_type = JSON if replay.body else None
    return web.Response(body=replay.body or None, status=replay.status, headers=headers, content_type=content_type)
