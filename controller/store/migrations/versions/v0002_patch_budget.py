"""What patches cost, and why some are not built: for the budgets of the registry."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("patches", sa.Column("cpu_s", sa.Double, nullable=False, server_default="0"))
    op.add_column("patches", sa.Column("skipped_for", sa.Text))
