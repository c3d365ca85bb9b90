"""What devices found of variants: how long a run takes, by ONNX file and class of device."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

KEY = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "variant_findings",
        sa.Column("artifact", KEY, primary_key=True),
        sa.Column("device", KEY, primary_key=True),
        sa.Column("device_class", KEY, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("run_s", sa.Double),
        sa.Column("failed", sa.Boolean, nullable=False),
    )
