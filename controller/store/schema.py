"""The tables, as the newest migration leaves them.

A value that is only ever read and written whole (a device, a rollout) is one JSON document in a text column, beside the
columns that it is looked up by; a value that SQL must count, sum or compare has columns of its own. Keys compare byte
by byte in every database, so that pages come in the same order everywhere.

A change here needs a migration in `migrations/versions`; a test compares the two.
"""

from typing import Any

import msgspec
import sqlalchemy as sa

from common.errors import IntegrityFailure
from common.monitoring.sketch import Sketch
from common.wire import LATENCY_BOUNDS_S, RUN_ROWS_BOUNDS
from controller.devices import Device
from controller.rollouts.model import Execution, Rollout
from controller.store.port import Release, Token


class Document(sa.types.TypeDecorator[Any]):
    """A msgspec value kept as JSON text. What can no longer be read is an `IntegrityFailure`."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, value_type: Any) -> None:
        super().__init__()
        self.value_type = value_type

    def process_bind_param(self, value: Any | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: Any | None, dialect: sa.Dialect) -> Any | None:
        if value is None:
            return None
        try:
            return msgspec.json.decode(value, type=self.value_type)
        except msgspec.DecodeError as error:
            raise IntegrityFailure(f"a stored {self.value_type} cannot be read: {error}") from error


Key = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
Sequence = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up only an INTEGER primary key
Facts = Document(dict[str, object])
LATENCY_COLUMNS = tuple(f"latency_{index:02}" for index in range(len(LATENCY_BOUNDS_S) + 1))
QUEUE_COLUMNS = tuple(f"queue_{index:02}" for index in range(len(LATENCY_BOUNDS_S) + 1))
RUN_COLUMNS = tuple(f"runs_{index:02}" for index in range(len(RUN_ROWS_BOUNDS) + 1))


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _seconds(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=False, server_default="0")


metadata = sa.MetaData()

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("document", Document(Device), nullable=False),
)

orders = sa.Table(
    "orders",
    metadata,
    sa.Column("device", Key, primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("published", sa.Boolean, nullable=False),
    sa.Index("orders_by_publication", "published", "created_at"),
)

releases = sa.Table(
    "releases",
    metadata,
    sa.Column("model", Key, primary_key=True),
    sa.Column("version", Key, primary_key=True),
    sa.Column("envelope", Key, nullable=False, index=True),
    sa.Column("document", Document(Release), nullable=False),
)

release_files = sa.Table(
    "release_files",
    metadata,
    sa.Column("model", Key, primary_key=True),
    sa.Column("version", Key, primary_key=True),
    sa.Column("variant", Key, primary_key=True),
    sa.Column("file", Key, primary_key=True),
    sa.Column("digest", Key, nullable=False, index=True),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("digest", Key, primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("arrived_at", sa.Double, nullable=False, index=True),
)

patches = sa.Table(
    "patches",
    metadata,
    sa.Column("base", Key, primary_key=True),
    sa.Column("target", Key, primary_key=True),
    sa.Column("codec", Key, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("patch", Key, index=True),
    sa.Column("size", sa.BigInteger),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("cpu_s", sa.Double, nullable=False, server_default="0"),
    sa.Column("skipped_for", sa.Text),
    sa.Index("patches_by_state", "state", "created_at"),
    sa.Index("patches_by_target", "target"),
)

parts = sa.Table(
    "parts",
    metadata,
    sa.Column("file", Key, primary_key=True),
    sa.Column("digest", Key, nullable=False, index=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("active", sa.Boolean, nullable=False, index=True),
    sa.Column("document", Document(Rollout), nullable=False),
)

executions = sa.Table(
    "executions",
    metadata,
    sa.Column("rollout", Key, primary_key=True),
    sa.Column("device", Key, primary_key=True),
    sa.Column("document", Document(Execution), nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("sha256", Key, nullable=False, unique=True),
    sa.Column("document", Document(Token), nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", Sequence, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False, index=True),
    sa.Column("data", Facts, nullable=False),
    sqlite_autoincrement=True,  # a number is never given twice, also after old events were forgotten
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", Sequence, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("detail", Facts, nullable=False),
    sqlite_autoincrement=True,
)

responses = sa.Table(
    "responses",
    metadata,
    sa.Column("actor", Key, primary_key=True),
    sa.Column("key", Key, primary_key=True),
    sa.Column("request_sha256", sa.Text, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False, index=True),
)

telemetry = sa.Table(
    "telemetry",
    metadata,
    sa.Column("device", Key, primary_key=True),
    sa.Column("model", Key, primary_key=True),
    sa.Column("version", Key, primary_key=True),
    sa.Column("started_at", sa.Double, primary_key=True),
    sa.Column("ended_at", sa.Double, nullable=False, index=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("errors", sa.BigInteger, nullable=False),
    sa.Column("latency_sum_s", sa.Double, nullable=False),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in LATENCY_COLUMNS),
    *map(_count, (*QUEUE_COLUMNS, *RUN_COLUMNS, "run_rows", "refused", "expired", "cancelled", "labelled", "correct")),
    *map(_seconds, ("queue_sum_s", "queue_max_s", "run_sum_s")),
    sa.Index("telemetry_by_release", "model", "version", "ended_at"),
)

device_telemetry = sa.Table(
    "device_telemetry",
    metadata,
    sa.Column("device", Key, primary_key=True),
    sa.Column("started_at", sa.Double, primary_key=True),
    sa.Column("ended_at", sa.Double, nullable=False, index=True),
    sa.Column("cpu_s", sa.Double, nullable=False),
    sa.Column("rss_bytes", sa.BigInteger, nullable=False),
    sa.Column("pss_bytes", sa.BigInteger),
    sa.Column("windows_lost", sa.BigInteger, nullable=False),
    sa.Column("files_bad", sa.BigInteger, nullable=False),
    sa.Column("files_mended", sa.BigInteger, nullable=False),
)

sketches = sa.Table(
    "sketches",
    metadata,
    sa.Column("device", Key, primary_key=True),
    sa.Column("model", Key, primary_key=True),
    sa.Column("version", Key, primary_key=True),
    sa.Column("reference", Key, primary_key=True),
    sa.Column("span_at", sa.Double, primary_key=True),
    sa.Column("ended_at", sa.Double, nullable=False, index=True),
    sa.Column("document", Document(Sketch), nullable=False),
    sa.Index("sketches_by_release", "model", "version", "ended_at"),
)

variant_findings = sa.Table(
    "variant_findings",
    metadata,
    sa.Column("artifact", Key, primary_key=True),
    sa.Column("device", Key, primary_key=True),
    sa.Column("device_class", Key, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("run_s", sa.Double),
    sa.Column("failed", sa.Boolean, nullable=False),
)

drift_references = sa.Table(
    "drift_references",
    metadata,
    sa.Column("digest", Key, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
