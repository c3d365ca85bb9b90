"""Every refusal in one form: `application/problem+json` (RFC 9457), also for what aiohttp refuses by itself.

An error of ours knows its code, field and fix; this module knows which HTTP status its class means. Anything else is a
fault of ours: it is logged with its trace and answered without details, so that no secret leaves in a stack trace.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from aiohttp import web
from opentelemetry import trace

from common.errors import (
    Conflict,
    FerryError,
    Forbidden,
    IntegrityFailure,
    InvalidInput,
    NotFound,
    PreconditionFailed,
    StorageFull,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from controller.resources import Problem

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:edgeferry:problem:"
RETRY_AFTER_S = 2


class KeyReused(InvalidInput):
    """An Idempotency-Key that was already used for a different request."""

    code = "idempotency_key_reused"


STATUS_OF: Mapping[type[FerryError], HTTPStatus] = {
    KeyReused: HTTPStatus.UNPROCESSABLE_ENTITY,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    InvalidInput: HTTPStatus.BAD_REQUEST,
    Unauthenticated: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    PreconditionFailed: HTTPStatus.PRECONDITION_FAILED,
    IntegrityFailure: HTTPStatus.UNPROCESSABLE_ENTITY,
    StorageFull: HTTPStatus.INSUFFICIENT_STORAGE,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""The status that a class of error means; a class that is not here means what its nearest ancestor means."""

CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 417: "expectation_failed"}


def status_of(error: FerryError) -> HTTPStatus:
    """The HTTP status for `error`."""
    found = (STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)
    return next(found, HTTPStatus.INTERNAL_SERVER_ERROR)


def problem_of(error: FerryError) -> web.Response:
    """The answer to a request that met `error`."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="edgeferry"'
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return respond(status, error.code, error.message, field=error.field, fix=error.fix, headers=headers)


def problem_of_http(error: web.HTTPException, path: str) -> web.Response:
    """The answer in our form where aiohttp itself refused: no such route, wrong method, body too large."""
    status = HTTPStatus(error.status)
    code = CODE_OF_STATUS.get(error.status, status.phrase.lower().replace(" ", "_"))
    allow = error.headers.get("Allow")
    fix = {404: "see /v1/openapi.json for the routes", 405: f"use {allow}"}.get(error.status)
    detail = f"{status.phrase}: {path[:120]}"
    return respond(status, code, detail, fix=fix, headers={"Allow": allow} if allow else None)


def internal_problem() -> web.Response:
    """The answer to a request that met a fault of ours; the log has the rest under the same trace id."""
    fix = "try again; if it stays, look for this trace id in the controller's log"
    return respond(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the controller failed", fix=fix)


def respond(
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    field: str | None = None,
    fix: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """A problem document."""
    problem = Problem(
        type=f"{TYPE_PREFIX}{code}",
        title=status.phrase,
        status=status.value,
        detail=detail,
        code=code,
        field=field,
        fix=fix,
        trace_id=trace_id(),
    )
    body = msgspec.json.encode(problem)
    return web.Response(body=body, status=status.value, content_type=CONTENT_TYPE, headers=headers)


def trace_id() -> str | None:
    """The current trace, as 32 hex digits."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None
