"""The controller's refusals (RFC 9457 problem documents) as our own errors.

A status says whose fault it was, the document's `detail`, `field` and `fix` say what to do. An answer that is no
problem document (a proxy's page, a captive portal) still becomes an error with the status in it. Anything that may pass
by itself (5xx, 408, 429, a redirect) is `Unavailable`.
"""

import msgspec

from common.errors import (
    Conflict,
    FerryError,
    Forbidden,
    InvalidInput,
    NotFound,
    PreconditionFailed,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

PROBLEM_BYTES_MAX = 64 * 1024
DETAIL_CHARS_MAX = 512

_BY_STATUS: dict[int, type[FerryError]] = {
    400: InvalidInput,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: PreconditionFailed,
    413: TooLarge,
    422: InvalidInput,
}


class Problem(msgspec.Struct, frozen=True):
    """The members of a problem document that we use; the others are ignored."""

    title: str = ""
    detail: str = ""
    field: str | None = None
    fix: str | None = None


def problem_error(status: int, body: bytes, what: str) -> FerryError:
    """The error for an answer with `status` to a request that meant `what` (such as "the join")."""
    try:
        problem = msgspec.json.decode(body[:PROBLEM_BYTES_MAX], type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = Problem()
    said = (problem.detail or problem.title)[:DETAIL_CHARS_MAX]
    error_type = _BY_STATUS.get(status, Unavailable)
    message = said or f"the controller answered {status} to {what}"
    return error_type(message, field=problem.field, fix=problem.fix)
