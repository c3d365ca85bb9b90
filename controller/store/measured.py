"""Tables about what devices measured.

A row for each window, with a column for each bucket, so that SQL does the sums. Sketches are documents that SQL cannot
sum: those of windows that begin within `SKETCH_SPAN_S` are added up as they come, in one row a device and release.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import sqlalchemy as sa

from common.ids import DeviceId, Digest, ReleaseRef
from common.monitoring.reference import Reference, decode_reference
from common.monitoring.sketch import Sketch, merged
from common.wire import LATENCY_BOUNDS_S, DeviceWindow, TelemetryWindow
from controller.store import schema
from controller.store.dialect import BOUND_VALUES_MAX, Row, insert_absent, upsert
from controller.store.port import DeviceTotals, ReleaseTotals

SKETCH_SPAN_S = 600.0
"""A tenth of the usual time that is looked back over, and a sixtieth of the rows that windows would make."""

_SUMS = (
    "requests", "errors", "latency_sum_s", "queue_sum_s", "run_rows", "run_sum_s", "refused", "expired", "cancelled",
    "labelled", "correct",
)  # fmt: skip
_COUNTS = {
    "latency_counts": schema.LATENCY_COLUMNS,
    "queue_counts": schema.QUEUE_COLUMNS,
    "run_counts": schema.RUN_COLUMNS,
}


class SqlTelemetryLog:
    """`port.TelemetryLog`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def add(
        self, device: DeviceId, windows: Sequence[TelemetryWindow], device_windows: Sequence[DeviceWindow] = ()
    ) -> None:
        self._add_sketches(device, windows)
        insert_absent(self._connection, schema.telemetry, [_window_row(device, window) for window in windows])
        rows = [{"device": device, **msgspec.structs.asdict(window)} for window in device_windows]
        insert_absent(self._connection, schema.device_telemetry, rows)

    def totals(self, release: ReleaseRef, since: float, devices: Sequence[DeviceId] | None = None) -> ReleaseTotals:
        chosen = _of_release(schema.telemetry, release, since)
        groups = _groups(schema.telemetry.c.device, devices)
        return _together([self._sum(*chosen, *group) for group in groups])

    def usage(self, release: ReleaseRef, since: float, devices: Sequence[DeviceId] | None = None) -> DeviceTotals:
        windows, used = schema.telemetry, schema.device_telemetry
        chosen = (
            windows.c.device == used.c.device,
            windows.c.started_at == used.c.started_at,
            *_of_release(windows, release, since),
        )
        parts = [self._used(*chosen, *group) for group in _groups(used.c.device, devices)]
        return DeviceTotals(
            devices=sum(part.devices for part in parts),
            seconds=sum(part.seconds for part in parts),
            cpu_s=sum(part.cpu_s for part in parts),
            rss_bytes_max=max((part.rss_bytes_max for part in parts), default=0),
            pss_bytes_max=max((part.pss_bytes_max for part in parts), default=0),
            windows_lost=sum(part.windows_lost for part in parts),
            files_bad=sum(part.files_bad for part in parts),
            files_mended=sum(part.files_mended for part in parts),
        )

    def sketches(
        self, release: ReleaseRef, since: float, devices: Sequence[DeviceId] | None = None
    ) -> Mapping[Digest, Sketch]:
        table, found = schema.sketches, dict[Digest, Sketch]()
        for group in _groups(table.c.device, devices):
            query = sa.select(table.c.document).where(*_of_release(table, release, since), *group)
            for sketch in self._connection.scalars(query):
                known = found.get(sketch.reference)
                found[sketch.reference] = sketch if known is None else merged(known, sketch)
        return found

    def put_reference(self, digest: Digest, data: bytes) -> None:
        upsert(self._connection, schema.drift_references, [{"digest": digest, "data": data}])

    def reference(self, digest: Digest) -> Reference | None:
        table = schema.drift_references
        data = self._connection.scalar(sa.select(table.c.data).where(table.c.digest == digest))
        return None if data is None else decode_reference(data)

    def forget(self, before: float) -> int:
        for table in (schema.sketches, schema.device_telemetry):
            self._connection.execute(table.delete().where(table.c.ended_at < before))
        windows = schema.telemetry
        return self._connection.execute(windows.delete().where(windows.c.ended_at < before)).rowcount

    def _sum(self, *conditions: sa.ColumnElement[bool]) -> ReleaseTotals:
        columns = schema.telemetry.c
        names = (*_SUMS, *(name for names in _COUNTS.values() for name in names))
        sums = [sa.func.coalesce(sa.func.sum(columns[name]), 0).label(name) for name in names]
        longest = sa.func.coalesce(sa.func.max(columns.queue_max_s), 0).label("queue_max_s")
        query = sa.select(sa.func.count(sa.distinct(columns.device)).label("devices"), longest, *sums)
        row = self._connection.execute(query.where(*conditions)).one()._asdict()
        counts = {field: tuple(int(row.pop(name)) for name in names) for field, names in _COUNTS.items()}
        plain = {name: float(value) if name.endswith("_s") else int(value) for name, value in row.items()}
        return msgspec.convert({**plain, **counts}, ReleaseTotals)

    def _used(self, *conditions: sa.ColumnElement[bool]) -> DeviceTotals:
        columns = schema.device_telemetry.c
        by_device = (
            sa.select(
                sa.func.sum(columns.ended_at - columns.started_at).label("seconds"),
                sa.func.sum(columns.cpu_s).label("cpu_s"),
                sa.func.max(columns.rss_bytes).label("rss_bytes_max"),
                sa.func.max(columns.pss_bytes).label("pss_bytes_max"),
                sa.func.max(columns.windows_lost).label("windows_lost"),
                sa.func.sum(columns.files_bad).label("files_bad"),
                sa.func.sum(columns.files_mended).label("files_mended"),
            )
            .where(*conditions)
            .group_by(columns.device)
            .subquery()
        )
        largest = {"rss_bytes_max", "pss_bytes_max"}
        values = [
            sa.func.coalesce((sa.func.max if column.name in largest else sa.func.sum)(column), 0).label(column.name)
            for column in by_device.c
        ]
        query = sa.select(sa.func.count().label("devices"), *values).select_from(by_device)
        row = self._connection.execute(query).one()._asdict()
        plain = {name: float(value) if name in {"seconds", "cpu_s"} else int(value) for name, value in row.items()}
        return msgspec.convert(plain, DeviceTotals)

    def _add_sketches(self, device: DeviceId, windows: Sequence[TelemetryWindow]) -> None:
        """Add what windows that are new have sketched to the sums of their spans."""
        sketched = {_key(window): window for window in windows if window.sketch is not None}
        for key in self._known(device, list(sketched.values())):
            sketched.pop(key, None)
        for window in sketched.values():
            self._add_sketch(device, window)

    def _known(self, device: DeviceId, windows: Sequence[TelemetryWindow]) -> Iterator[tuple[str, str, float]]:
        columns = schema.telemetry.c
        query = sa.select(columns.model, columns.version, columns.started_at).where(
            columns.device == device, columns.started_at.in_([window.started_at for window in windows])
        )
        yield from ((row.model, row.version, row.started_at) for row in self._connection.execute(query))

    def _add_sketch(self, device: DeviceId, window: TelemetryWindow) -> None:
        table, sketch = schema.sketches, window.sketch
        if sketch is None:
            return
        span_at = window.started_at // SKETCH_SPAN_S * SKETCH_SPAN_S
        names = {"device": device, "model": window.model, "version": window.version, "reference": sketch.reference}
        key: Row = {**names, "span_at": span_at}
        query = sa.select(table.c.document, table.c.ended_at).where(*(table.c[name] == key[name] for name in key))
        row = self._connection.execute(query).one_or_none()
        total = sketch if row is None else merged(row.document, sketch)
        ended_at = window.ended_at if row is None else max(row.ended_at, window.ended_at)
        upsert(self._connection, table, [{**key, "ended_at": ended_at, "document": total}])


def _key(window: TelemetryWindow) -> tuple[str, str, float]:
    return window.model, window.version, window.started_at


def _of_release(table: sa.Table, release: ReleaseRef, since: float) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.model == release.model, table.c.version == release.version, table.c.ended_at >= since


def _groups(column: sa.Column[str], devices: Sequence[DeviceId] | None) -> list[tuple[sa.ColumnElement[bool], ...]]:
    """Conditions that choose `devices` (None: all), in parts that share none and that every database takes."""
    if devices is None:
        return [()]
    names = sorted(set(devices))
    return [(column.in_(names[start : start + BOUND_VALUES_MAX]),) for start in range(0, len(names), BOUND_VALUES_MAX)]


def _window_row(device: DeviceId, window: TelemetryWindow) -> Row:
    row = msgspec.structs.asdict(window)
    row.pop("sketch")
    for field, names in _COUNTS.items():
        row.update(zip(names, row.pop(field) or (0,) * len(names), strict=True))
    return {"device": device, **row}


def _together(parts: Sequence[ReleaseTotals]) -> ReleaseTotals:
    """The totals of groups that share no device."""
    buckets, sizes = (0,) * (len(LATENCY_BOUNDS_S) + 1), (0,) * len(schema.RUN_COLUMNS)
    return ReleaseTotals(
        devices=sum(part.devices for part in parts),
        requests=sum(part.requests for part in parts),
        errors=sum(part.errors for part in parts),
        latency_counts=_added(buckets, [part.latency_counts for part in parts]),
        latency_sum_s=sum(part.latency_sum_s for part in parts),
        queue_counts=_added(buckets, [part.queue_counts for part in parts]),
        queue_sum_s=sum(part.queue_sum_s for part in parts),
        queue_max_s=max((part.queue_max_s for part in parts), default=0.0),
        run_counts=_added(sizes, [part.run_counts for part in parts]),
        run_rows=sum(part.run_rows for part in parts),
        run_sum_s=sum(part.run_sum_s for part in parts),
        refused=sum(part.refused for part in parts),
        expired=sum(part.expired for part in parts),
        cancelled=sum(part.cancelled for part in parts),
        labelled=sum(part.labelled for part in parts),
        correct=sum(part.correct for part in parts),
    )


def _added(nothing: tuple[int, ...], rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(nothing, *rows, strict=True)))
