"""What differs between the databases: how to insert or replace a row, and what their errors mean.

Everything else in this package is SQL that SQLite and PostgreSQL both take. Another database adds its insert and its
error codes here, and an engine of its own.
"""

import functools
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError

from common.errors import Conflict, FerryError, IntegrityFailure, StorageFull, Unavailable

Row = Mapping[str, Any]
Insert = sqlite.Insert | postgresql.Insert

BOUND_VALUES_MAX = 900
"""Values in one `IN (...)`: the oldest SQLite that we may meet takes 999 parameters."""

_INSERTS: dict[str, Callable[[sa.Table], Insert]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_FSYNC}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_FULL_SQLSTATE = "53100"  # PostgreSQL, Appendix A: disk_full


def upsert(connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
    """Insert the rows, replacing those with the same primary key."""
    if rows:
        connection.execute(_upsert_statement(connection.dialect.name, table), rows)


def insert_new(connection: sa.Connection, table: sa.Table, row: Row) -> bool:
    """Insert the row unless its primary key is taken; whether it was inserted."""
    return connection.execute(_insert_new_statement(connection.dialect.name, table), row).rowcount > 0


def insert_absent(connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
    """Insert those rows whose primary key is not taken."""
    if rows:
        connection.execute(_insert_new_statement(connection.dialect.name, table), rows)


def upsert_if_greater(connection: sa.Connection, table: sa.Table, row: Row, column: str) -> bool:
    """Insert the row, or replace the one with its primary key if `column` grows; whether either happened."""
    statement = _upsert_statement(connection.dialect.name, table, column)
    return connection.execute(statement, row).rowcount > 0


@functools.cache
def _upsert_statement(dialect: str, table: sa.Table, grows: str | None = None) -> Insert:
    insert = _INSERTS[dialect](table)
    keys = [column.name for column in table.primary_key]
    values = {column.name: insert.excluded[column.name] for column in table.columns if not column.primary_key}
    condition = None if grows is None else table.columns[grows] < insert.excluded[grows]
    return insert.on_conflict_do_update(index_elements=keys, set_=values, where=condition)


@functools.cache
def _insert_new_statement(dialect: str, table: sa.Table) -> Insert:
    keys = [column.name for column in table.primary_key]
    return _INSERTS[dialect](table).on_conflict_do_nothing(index_elements=keys)


def explained(error: BaseException, place: str) -> BaseException:
    """The error of ours that a database error stands for, or the error itself; `place` names the database."""
    for cause in _chain(error):
        ours = _explained_one(cause, place)
        if ours is not None:
            ours.__cause__ = error
            return ours
    return error


def _explained_one(error: BaseException, place: str) -> FerryError | None:
    if not isinstance(error, DBAPIError):
        return None
    code = getattr(error.orig, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF  # extended result codes keep the primary one in the low byte
    if code in _FULL or getattr(error.orig, "sqlstate", None) == _FULL_SQLSTATE:
        fix = "free some space, or check the disk; nothing was lost"
        return StorageFull(f"the disk that holds {place} takes no more bytes", fix=fix)
    if primary in _BUSY:
        return Unavailable(f"{place} is locked by another program", fix="close that program and try again")
    if primary in _DAMAGED:
        return IntegrityFailure(f"{place} is damaged or not a database", fix="restore it from a backup")
    if isinstance(error, IntegrityError):
        return Conflict(f"{place} refused a value that breaks a rule of its tables: {error.orig}")
    return None


def _chain(error: BaseException) -> Iterable[BaseException]:
    """The error and what it was raised from or during, newest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
