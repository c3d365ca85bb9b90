"""The fleet as operators see it, and the two routes that a device uses when MQTT is silent."""

import msgspec
from aiohttp import web

from common.errors import NotFound
from common.expr import compile_expression
from common.ids import DeviceId, check_labels, parse_device_id
from common.wire import ReportedState
from controller.api import conditional
from controller.api.pages import page_of
from controller.api.route import Answer, Call, route
from controller.api.views import device_view
from controller.devices import FACT_NAMES, Device, facts
from controller.intake import apply_reported
from controller.resources import DeviceQuery, DeviceView, Page, RelabelDevice
from controller.store.port import Transaction

DEVICES_PER_READ = 500
ORDER_CONTENT_TYPE = "application/vnd.edgeferry.order+json"


@route("GET", "/v1/devices", summary="List devices that a selector matches")
async def index(call: Call, query: DeviceQuery) -> Answer[Page[DeviceView]]:
    """By id. A bad selector is refused before anything is read."""
    expression = compile_expression(query.selector, FACT_NAMES, "selector")
    after = parse_device_id(query.after, "after") if query.after else ""

    def work(tx: Transaction) -> list[Device]:
        found: list[Device] = []
        last: str = after
        while len(found) <= query.limit:
            batch = tx.devices.page(last, DEVICES_PER_READ)
            found += [device for device in batch if expression.matches(facts(device, call.now))]
            if len(batch) < DEVICES_PER_READ:
                break
            last = batch[-1].id
        return found[: query.limit + 1]

    found = await call.read(work)
    return Answer(value=page_of([device_view(one, call.now) for one in found], query.limit, lambda view: view.id))


@route("GET", "/v1/devices/{device}", summary="Show a device: what it should run and what it runs")
async def show(call: Call, device: DeviceId) -> Answer[DeviceView]:
    """The ETag names what operators can change (labels); reports of the device itself do not move it."""
    found = await call.read(lambda tx: _device(tx, device))
    return Answer(value=device_view(found, call.now), etag=etag_of(found))


@route("PATCH", "/v1/devices/{device}", summary="Change a device's labels (JSON merge patch)")
async def relabel(call: Call, device: DeviceId, body: RelabelDevice) -> Answer[DeviceView]:
    """Null removes a label. If-Match is honoured."""

    def work(tx: Transaction) -> Answer[DeviceView]:
        found = _device(tx, device)
        call.check_unchanged(etag_of(found))
        merged = {**found.labels, **body.labels}
        labels = check_labels({key: value for key, value in merged.items() if value is not None})
        changed = msgspec.structs.replace(found, labels=labels, revision=found.revision + 1)
        tx.devices.put(changed)
        call.record(tx, "device.label", device, labels=dict(body.labels))
        call.announce(tx, "device.labelled", device, labels=labels)
        return Answer(value=device_view(changed, call.now), etag=etag_of(changed))

    return await call.write(work)


@route(
    "GET",
    "/v1/devices/{device}/desired",
    summary="The newest signed order for a device",
    roles=("device", "admin"),
    statuses=(200, 304),
    produces=ORDER_CONTENT_TYPE,
)
async def desired(call: Call, device: DeviceId) -> web.StreamResponse:
    """The DSSE envelope as it was signed; its digest is the entity tag, so polling costs almost nothing."""
    order = await call.read(lambda tx: tx.orders.get(device))
    if order is None:
        raise NotFound(f"there is no order for {device}", field="device", fix="has it joined this fleet?")
    headers = {"ETag": conditional.quote(order.etag), "Cache-Control": "no-cache"}
    if conditional.matches_weakly(call.request.headers.get("If-None-Match"), headers["ETag"]):
        return web.Response(status=304, headers=headers)
    return web.Response(body=order.envelope, headers=headers, content_type=ORDER_CONTENT_TYPE)


@route(
    "PUT",
    "/v1/devices/{device}/reported",
    summary="What a device says it runs, when MQTT is silent",
    roles=("device",),
    statuses=(204,),
)
async def reported(call: Call, device: DeviceId, body: ReportedState) -> Answer[None]:
    """Goes the same way as the MQTT message; an old one is ignored."""

    def work(tx: Transaction) -> Answer[None]:
        apply_reported(tx, device, body, call.now)
        return Answer(value=None)

    answer = await call.write(work)
    call.deps.reconciler.nudge()
    return answer


def etag_of(device: Device) -> str:
    """The entity tag of what operators can change."""
    return conditional.quote(f"r{device.revision}")


def _device(tx: Transaction, device: DeviceId) -> Device:
    found = tx.devices.get(device)
    if found is None:
        raise NotFound(f"there is no device {device}", field="device", fix="see: ferry device list")
    return found
