"""What Alembic runs: the migrations, on the connection and in the transaction that `controller.store.migrate` gives.

Batch mode, because SQLite cannot change most of a column in place: Alembic copies the table instead.
"""

from alembic import context

from controller.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
