"""Tables about devices: the devices themselves and their newest orders."""

from collections import Counter
from collections.abc import Iterator

import msgspec
import sqlalchemy as sa

from common.errors import Conflict
from common.ids import DeviceId, Digest
from controller.devices import Device
from controller.store import schema
from controller.store.dialect import upsert, upsert_if_greater
from controller.store.port import Order

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
