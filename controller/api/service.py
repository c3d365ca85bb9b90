"""The controller about itself: health, metrics, its own description, and the audit log."""

from importlib.metadata import version

from aiohttp import web

from common.errors import FerryError, InvalidInput
from controller.api.openapi import document
from controller.api.pages import page_of
from controller.api.route import Answer, Call, route
from controller.resources import HealthView, Page, PageQuery
from controller.store.port import AuditEntry

SEQ_DIGITS_MAX = 18


@route("GET", "/v1/health", summary="Whether the controller serves", roles=(), statuses=(200, 503))
async def health(call: Call) -> Answer[HealthView]:
    """503 when the store cannot be read; a part in trouble (the broker) only makes it degraded."""
    parts = dict(call.deps.health())
    try:
        await call.read(lambda tx: tx.journal.audit_before(None, 1))
        status, parts["store"] = 200, "ok"
    except FerryError as error:
        status, parts["store"] = 503, error.message
    well = all(state == "ok" for state in parts.values())
    view = HealthView(status="ok" if well else "degraded", version=version("edgeferry"), parts=parts)
    return Answer(value=view, status=status)


@route("GET", "/v1/openapi.json", summary="This API as an OpenAPI 3.1 document", roles=())
async def openapi(call: Call) -> web.StreamResponse:
    """Generated from the routes that serve."""
    del call
    return web.json_response(document())


@route("GET", "/metrics", summary="Metrics for Prometheus", roles=(), produces="text/plain")
async def metrics(call: Call) -> web.StreamResponse:
    """Counts and durations; no names of devices, no secrets."""
    body, content_type = call.deps.metrics()
    return web.Response(body=body, headers={"Content-Type": content_type})


@route("GET", "/v1/audit", summary="Who did what, newest first")
async def audit(call: Call, query: PageQuery) -> Answer[Page[AuditEntry]]:
    """`after` is the last `seq` seen."""
    if query.after and not (query.after.isascii() and query.after.isdigit() and len(query.after) <= SEQ_DIGITS_MAX):
        raise InvalidInput("is not a cursor of this list", field="after", fix="send the `next` of the last page")
    before = int(query.after) if query.after else None
    found = await call.read(lambda tx: tx.journal.audit_before(before, query.limit + 1))
    return Answer(value=page_of(found, query.limit, lambda entry: str(entry.seq)))
