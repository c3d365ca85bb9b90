"""Tables about devices: the devices themselves, their newest orders, and what they measured."""

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import sqlalchemy as sa

from common.errors import Conflict
from common.ids import DeviceId, Digest, ReleaseRef
from common.wire import TelemetryWindow
from controller.devices import Device
from controller.store import schema
from controller.store.dialect import BOUND_VALUES_MAX, Row, insert_absent, upsert, upsert_if_greater
from controller.store.port import Order, ReleaseTotals

DEVICES_PER_READ = 500


class SqlDevices:
    """`port.Devices`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, device: DeviceId) -> Device | None:
        table = schema.devices
        return self._connection.scalar(sa.select(table.c.document).where(table.c.id == device))

    def put(self, device: Device) -> None:
        upsert(self._connection, schema.devices, [{"id": device.id, "document": device}])

    def page(self, after: str, limit: int) -> list[Device]:
        table = schema.devices
        query = sa.select(table.c.document).where(table.c.id > after).order_by(table.c.id).limit(limit)
        return list(self._connection.scalars(query))

    def all(self) -> Iterator[Device]:
        """In pages, so that the work may change devices while it walks over them."""
        after = ""
        while page := self.page(after, DEVICES_PER_READ):
            yield from page
            after = page[-1].id

    def holders(self) -> Counter[Digest]:
        """Only the digests are decoded, a page at a time: a tenth of the cost of whole devices."""
        table = schema.devices
        held: Counter[Digest] = Counter()
        after = ""
        text = sa.type_coerce(table.c.document, sa.Text)
        while rows := self._connection.execute(
            sa.select(table.c.id, text).where(table.c.id > after).order_by(table.c.id).limit(DEVICES_PER_READ)
        ).all():
            for _, document in rows:
                reported = msgspec.json.decode(document, type=_Holder).reported
                held.update(set(reported.held) if reported else ())
            after = rows[-1].id
        return held


class _Held(msgspec.Struct):
    held: tuple[Digest, ...] = ()


class _Holder(msgspec.Struct):
    """The part of a `Device` that says what files it holds."""

    reported: _Held | None = None


class SqlOrders:
    """`port.Orders`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def get(self, device: DeviceId) -> Order | None:
        row = self._connection.execute(sa.select(schema.orders).where(schema.orders.c.device == device)).first()
        return None if row is None else Order(**row._asdict())

    def put(self, order: Order) -> None:
        if not upsert_if_greater(self._connection, schema.orders, msgspec.structs.asdict(order), "generation"):
            message = f"order {order.generation} of {order.device} is not newer than the one that is stored"
            raise Conflict(message, field="generation", fix="read the device again and order the next generation")

    def unpublished(self, limit: int) -> list[Order]:
        table = schema.orders
        query = sa.select(table).where(~table.c.published).order_by(table.c.created_at, table.c.device).limit(limit)
        return [Order(**row._asdict()) for row in self._connection.execute(query)]

    def mark_published(self, device: DeviceId, generation: int) -> None:
        table = schema.orders
        this_one = (table.c.device == device) & (table.c.generation == generation)
        self._connection.execute(table.update().where(this_one).values(published=True))


class SqlTelemetryLog:
    """`port.TelemetryLog`: a row for each window, with a column for each bucket, so that SQL does the sums."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def add(self, device: DeviceId, windows: Sequence[TelemetryWindow]) -> None:
        insert_absent(self._connection, schema.telemetry, [_window_row(device, window) for window in windows])

    def totals(self, release: ReleaseRef, since: float, devices: Sequence[DeviceId] | None = None) -> ReleaseTotals:
        table = schema.telemetry
        chosen = (table.c.model == release.model, table.c.version == release.version, table.c.ended_at >= since)
        if devices is None:
            return self._sum(*chosen)
        names = sorted(set(devices))
        groups = [names[start : start + BOUND_VALUES_MAX] for start in range(0, len(names), BOUND_VALUES_MAX)]
        return _together([self._sum(*chosen, table.c.device.in_(group)) for group in groups])

    def forget(self, before: float) -> int:
        table = schema.telemetry
        return self._connection.execute(table.delete().where(table.c.ended_at < before)).rowcount

    def _sum(self, *conditions: sa.ColumnElement[bool]) -> ReleaseTotals:
        columns = schema.telemetry.c
        names = ("requests", "errors", "latency_sum_s", *schema.LATENCY_COLUMNS)
        sums = (sa.func.coalesce(sa.func.sum(columns[name]), 0) for name in names)
        query = sa.select(sa.func.count(sa.distinct(columns.device)), *sums).where(*conditions)
        devices, requests, errors, latency_sum_s, *buckets = self._connection.execute(query).one()
        return ReleaseTotals(
            devices=devices,
            requests=int(requests),
            errors=int(errors),
            latency_counts=tuple(int(count) for count in buckets),
            latency_sum_s=float(latency_sum_s),
        )


def _window_row(device: DeviceId, window: TelemetryWindow) -> Row:
    row = msgspec.structs.asdict(window)
    counts = row.pop("latency_counts")
    return {"device": device, **row, **dict(zip(schema.LATENCY_COLUMNS, counts, strict=True))}


def _together(parts: Sequence[ReleaseTotals]) -> ReleaseTotals:
    """The totals of groups that share no device."""
    nothing = (0,) * len(schema.LATENCY_COLUMNS)
    return ReleaseTotals(
        devices=sum(part.devices for part in parts),
        requests=sum(part.requests for part in parts),
        errors=sum(part.errors for part in parts),
        latency_counts=tuple(map(sum, zip(nothing, *(part.latency_counts for part in parts), strict=True))),
        latency_sum_s=sum(part.latency_sum_s for part in parts),
    )
