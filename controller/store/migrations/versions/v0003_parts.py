"""The lists of the parts of files."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

KEY = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "parts",
        sa.Column("file", KEY, primary_key=True),
        sa.Column("digest", KEY, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_parts_digest", "parts", ["digest"])
