"""The table of what devices found of variants."""

from typing import Any

import msgspec
import sqlalchemy as sa

from common.ids import Digest, ReleaseRef
from controller.store import schema
from controller.store.dialect import insert_absent, upsert
from controller.store.port import DEVICES_PER_CLASS_MAX, FINDINGS_PER_FILE_MAX, FoundVariant


class SqlVariantFindings:
    """`port.VariantFindings`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def put(self, found: FoundVariant) -> None:
        row = msgspec.structs.asdict(found)
        release = row.pop("release")
        row.update(model=release.model, version=release.version)
        says_something = found.failed or found.run_s is not None
        (upsert if says_something else insert_absent)(self._connection, schema.variant_findings, [row])
        columns = schema.variant_findings.c
        of_file = columns.artifact == found.artifact
        self._keep_newest(DEVICES_PER_CLASS_MAX, of_file, columns.device_class == found.device_class)
        self._keep_newest(FINDINGS_PER_FILE_MAX, of_file)

    def of(self, artifact: Digest) -> list[FoundVariant]:
        table = schema.variant_findings
        query = sa.select(table).where(table.c.artifact == artifact).order_by(table.c.device_class, table.c.device)
        return [_found(row._asdict()) for row in self._connection.execute(query)]

    def _keep_newest(self, number: int, *conditions: sa.ColumnElement[bool]) -> None:
        table = schema.variant_findings
        newest_first = (table.c.at.desc(), table.c.device)
        old = sa.select(table.c.device).where(*conditions).order_by(*newest_first).offset(number)
        devices = list(self._connection.scalars(old))
        if devices:
            self._connection.execute(table.delete().where(*conditions, table.c.device.in_(devices)))


def _found(row: dict[str, Any]) -> FoundVariant:
    release = ReleaseRef(row.pop("model"), row.pop("version"))
    return FoundVariant(release=release, **row)
