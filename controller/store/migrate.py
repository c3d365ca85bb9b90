"""Bring a database to the tables of this program (Alembic), or refuse one that a newer program has changed.

All migrations run in the transaction of the caller: they all happen or none, and a second controller that opens the
same database waits for the first. There is no way down; a backup is the way back.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from common.errors import Conflict

FOLDER = Path(__file__).parent / "migrations"


def upgrade(connection: sa.Connection, place: str) -> None:
    """Run the migrations that are missing; `Conflict` if the database at `place` knows one that we do not."""
    config = configuration(connection)
    script = ScriptDirectory.from_config(config)
    applied = set(MigrationContext.configure(connection).get_current_heads())
    newest = set(script.get_heads())
    unknown = applied - {revision.revision for revision in script.walk_revisions()}
    if unknown:
        message = f"{place} was written by a newer Edgeferry (schema {', '.join(sorted(unknown))})"
        raise Conflict(message, field="database", fix="start that version, or restore the backup from before it")
    if applied != newest:
        command.upgrade(config, "head")


def configuration(connection: sa.Connection) -> Config:
    """Alembic's settings for a connection that is open already."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(FOLDER))
    config.set_main_option("path_separator", "os")
    return config
