"""The SQL adapter of the store: `open_store(url, clock)`.

SQLite in WAL mode with full synchronisation: readers never wait for the writer, each read sees one snapshot, and what
`write` has returned survives a power cut. All writes go through one thread (`writer`); reads run in a few threads, each
on a read-only connection. The driver's own idea of transactions is switched off: they begin and end where we say.
Migrations run when the database is opened.
"""

import asyncio
import contextvars
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool

from common.clock import Clock
from common.durable import PRIVATE_MODE, explaining_full_disk
from common.errors import InvalidInput, Unavailable
from controller.store import migrate
from controller.store.catalogue import SqlArtifacts, SqlParts, SqlPatches, SqlReleases
from controller.store.dialect import explained
from controller.store.findings import SqlVariantFindings
from controller.store.fleet import SqlDevices, SqlOrders
from controller.store.measured import SqlTelemetryLog
from controller.store.operations import SqlJournal, SqlRollouts, SqlTokens
from controller.store.port import Transaction
from controller.store.writer import GroupWriter

READERS = 4
WAITING_READS_MAX = 1024
BUSY_TIMEOUT_MS = 5000
"""How long a connection waits for a lock of another program, for example a backup."""
WAL_BYTES_KEPT_MAX = 64 * 1024 * 1024
"""A write-ahead log that grew beyond this is cut back to it at the next checkpoint."""

T = TypeVar("T")


async def open_store(url: str, clock: Clock) -> "SqlStore":
    """The store at `url` (`sqlite:///relative.db` or `sqlite:////absolute.db`), created or migrated as needed.

    Raises `InvalidInput` when the URL or the folder cannot be used, `Conflict` when a newer program wrote the database,
    `IntegrityFailure` when the file is no database, `StorageFull` and `Unavailable` as `Store.write` does.
    """
    return await asyncio.to_thread(_open, _checked_url(url), clock)


class SqlTransaction:
    """The tables, seen through one connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self.devices = SqlDevices(connection)
        self.orders = SqlOrders(connection)
        self.releases = SqlReleases(connection)
        self.artifacts = SqlArtifacts(connection)
        self.patches = SqlPatches(connection)
        self.parts = SqlParts(connection)
        self.rollouts = SqlRollouts(connection)
        self.tokens = SqlTokens(connection)
        self.journal = SqlJournal(connection)
        self.telemetry = SqlTelemetryLog(connection)
        self.findings = SqlVariantFindings(connection)


class SqlStore:
    """`controller.store.port.Store` over two engines of the same database: one that writes, one that only reads."""

    def __init__(self, writing: sa.Engine, reading: sa.Engine, place: str, clock: Clock) -> None:
        self._engines = (writing, reading)
        self._reading = reading
        self._place = place
        self._writer = GroupWriter(writing, SqlTransaction, self._explain, clock)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._reads = 0
        self._closing = False

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See the port."""
        if self._closing or self._reads >= WAITING_READS_MAX:
            raise Unavailable("the database is closing or has too many readers", fix="try again later")
        self._reads += 1
        try:
            context = contextvars.copy_context()
            return await asyncio.get_running_loop().run_in_executor(self._readers, context.run, self._read, work)
        finally:
            self._reads -= 1

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """See the port."""
        return await asyncio.wrap_future(self._writer.submit(work))

    async def close(self) -> None:
        """See the port."""
        self._closing = True
        await asyncio.to_thread(self._close)

    def _read(self, work: Callable[[Transaction], T]) -> T:
        try:
            with self._reading.connect() as connection, connection.begin():
                return work(SqlTransaction(connection))
        except DBAPIError as error:
            raise self._explain(error) from error

    def _close(self) -> None:
        self._writer.close()
        self._readers.shutdown()
        for engine in self._engines:
            engine.dispose()

    def _explain(self, error: BaseException) -> BaseException:
        return explained(error, self._place)


def _checked_url(url: str) -> URL:
    fix = "use sqlite:///PATH (four slashes for an absolute path)"
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidInput(f"{url[:80]!r} is no database URL", field="database", fix=fix) from error
    if parsed.get_backend_name() != "sqlite" or parsed.database in {None, "", ":memory:"}:
        raise InvalidInput(f"{parsed.render_as_string()!r} is not supported", field="database", fix=fix)
    return parsed


def _open(url: URL, clock: Clock) -> SqlStore:
    place = str(url.database)
    _create_private(Path(place))
    writing = sqlite_engine(url, "IMMEDIATE", connections=1, pragmas=("journal_mode = WAL", "synchronous = FULL"))
    try:
        with writing.connect() as connection, connection.begin():
            migrate.upgrade(connection, place)
    except Exception as error:
        writing.dispose()
        raise explained(error, place) from error
    reading = sqlite_engine(url, "DEFERRED", connections=READERS, pragmas=("query_only = ON",))
    return SqlStore(writing, reading, place, clock)


def _create_private(path: Path) -> None:
    """Make the file, so that only its owner can read it, and SQLite gives its log files the same mode."""
    try:
        with explaining_full_disk(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_MODE))
    except OSError as error:
        fix = "choose a folder that exists and that this user may write to"
        raise InvalidInput(f"cannot open {path}: {error.strerror}", field="database", fix=fix) from error


def sqlite_engine(url: URL, begin: str, connections: int, pragmas: tuple[str, ...]) -> sa.Engine:
    engine = sa.create_engine(url, poolclass=QueuePool, pool_size=connections, max_overflow=0)

    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # no hidden BEGIN: transactions are begun below
        for pragma in (f"busy_timeout = {BUSY_TIMEOUT_MS}", f"journal_size_limit = {WAL_BYTES_KEPT_MAX}", *pragmas):
            connection.execute(f"PRAGMA {pragma}").close()

    def begin_transaction(connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {begin}")

    sa.event.listen(engine, "connect", prepare)
    sa.event.listen(engine, "begin", begin_transaction)
    return engine
