"""The first tables. The comments on what they hold are in `controller.store.schema`."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KEY = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LATENCY_BUCKETS = 17


def upgrade() -> None:
    _create_fleet()
    _create_catalogue()
    _create_operations()
    _create_journal()


def _key(name: str) -> sa.Column[str]:
    return sa.Column(name, KEY, primary_key=True)


def _column(name: str, kind: "sa.types.TypeEngine[Any] | type[sa.types.TypeEngine[Any]]") -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


def _create_fleet() -> None:
    op.create_table("devices", _key("id"), _column("document", sa.Text))
    op.create_table(
        "orders",
        _key("device"),
        _column("generation", sa.BigInteger),
        _column("etag", sa.Text),
        _column("envelope", sa.LargeBinary),
        _column("created_at", sa.Double),
        _column("published", sa.Boolean),
    )
    op.create_index("orders_by_publication", "orders", ["published", "created_at"])
    op.create_table(
        "telemetry",
        _key("device"),
        _key("model"),
        _key("version"),
        sa.Column("started_at", sa.Double, primary_key=True),
        _column("ended_at", sa.Double),
        _column("requests", sa.BigInteger),
        _column("errors", sa.BigInteger),
        _column("latency_sum_s", sa.Double),
        *(_column(f"latency_{index:02}", sa.BigInteger) for index in range(LATENCY_BUCKETS)),
    )
    op.create_index("ix_telemetry_ended_at", "telemetry", ["ended_at"])
    op.create_index("telemetry_by_release", "telemetry", ["model", "version", "ended_at"])


def _create_catalogue() -> None:
    op.create_table("releases", _key("model"), _key("version"), _column("envelope", KEY), _column("document", sa.Text))
    op.create_index("ix_releases_envelope", "releases", ["envelope"])
    op.create_table(
        "release_files", _key("model"), _key("version"), _key("variant"), _key("file"), _column("digest", KEY)
    )
    op.create_index("ix_release_files_digest", "release_files", ["digest"])
    op.create_table("artifacts", _key("digest"), _column("size", sa.BigInteger), _column("arrived_at", sa.Double))
    op.create_index("ix_artifacts_arrived_at", "artifacts", ["arrived_at"])
    op.create_table(
        "patches",
        _key("base"),
        _key("target"),
        _key("codec"),
        _column("state", sa.Text),
        _column("created_at", sa.Double),
        sa.Column("patch", KEY),
        sa.Column("size", sa.BigInteger),
        _column("reason", sa.Text),
    )
    op.create_index("ix_patches_patch", "patches", ["patch"])
    op.create_index("patches_by_state", "patches", ["state", "created_at"])
    op.create_index("patches_by_target", "patches", ["target"])


def _create_operations() -> None:
    op.create_table("rollouts", _key("id"), _column("active", sa.Boolean), _column("document", sa.Text))
    op.create_index("ix_rollouts_active", "rollouts", ["active"])
    op.create_table("executions", _key("rollout"), _key("device"), _column("document", sa.Text))
    op.create_table(
        "tokens", _key("id"), _column("sha256", KEY), _column("document", sa.Text), sa.UniqueConstraint("sha256")
    )


def _create_journal() -> None:
    op.create_table(
        "events",
        sa.Column("seq", SEQUENCE, primary_key=True),
        _column("kind", sa.Text),
        _column("subject", sa.Text),
        _column("at", sa.Double),
        _column("data", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_at", "events", ["at"])
    op.create_table(
        "audit",
        sa.Column("seq", SEQUENCE, primary_key=True),
        _column("at", sa.Double),
        _column("actor", sa.Text),
        _column("action", sa.Text),
        _column("subject", sa.Text),
        _column("detail", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "responses",
        _key("actor"),
        _key("key"),
        _column("request_sha256", sa.Text),
        _column("status", sa.Integer),
        _column("body", sa.LargeBinary),
        _column("etag", sa.Text),
        _column("at", sa.Double),
    )
    op.create_index("ix_responses_at", "responses", ["at"])
