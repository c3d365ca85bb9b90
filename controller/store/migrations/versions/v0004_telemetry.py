"""What requests wait for, what labels and sketches say, and what the agents' processes use."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

KEY = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
LATENCY_BUCKETS = 17
RUN_BUCKETS = 8
COUNTS = (
    *(f"queue_{index:02}" for index in range(LATENCY_BUCKETS)),
    *(f"runs_{index:02}" for index in range(RUN_BUCKETS)),
    "run_rows",
    "refused",
    "expired",
    "cancelled",
    "labelled",
    "correct",
)
SECONDS = ("queue_sum_s", "queue_max_s", "run_sum_s")


def upgrade() -> None:
    for name in COUNTS:
        op.add_column("telemetry", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    for name in SECONDS:
        op.add_column("telemetry", sa.Column(name, sa.Double, nullable=False, server_default="0"))
    op.create_table(
        "device_telemetry",
        sa.Column("device", KEY, primary_key=True),
        sa.Column("started_at", sa.Double, primary_key=True),
        sa.Column("ended_at", sa.Double, nullable=False, index=True),
        sa.Column("cpu_s", sa.Double, nullable=False),
        sa.Column("rss_bytes", sa.BigInteger, nullable=False),
        sa.Column("pss_bytes", sa.BigInteger),
        sa.Column("windows_lost", sa.BigInteger, nullable=False),
        sa.Column("files_bad", sa.BigInteger, nullable=False),
        sa.Column("files_mended", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "sketches",
        sa.Column("device", KEY, primary_key=True),
        sa.Column("model", KEY, primary_key=True),
        sa.Column("version", KEY, primary_key=True),
        sa.Column("reference", KEY, primary_key=True),
        sa.Column("span_at", sa.Double, primary_key=True),
        sa.Column("ended_at", sa.Double, nullable=False, index=True),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_index("sketches_by_release", "sketches", ["model", "version", "ended_at"])
    op.create_table(
        "drift_references",
        sa.Column("digest", KEY, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
