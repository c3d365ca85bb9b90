"""Finished telemetry windows on the disk, until the broker has taken them.

A device may be offline for weeks, so the spool is capped in rows and in bytes: when it is full the oldest windows go,
and a counter says how many have gone for ever. What `add` returned from survives a killed process (SQLite, WAL); the
last moments before a power cut may be lost, which is the price of not waiting for the disk. A spool file that cannot be
read is set aside and a new one begun, and where no file can be, it is kept in memory: telemetry is never a reason not
to serve.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from common import durable
from common.errors import StorageFailed, StorageFull
from common.wire import TelemetryWindow

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILE_NAME = "telemetry.db"
UNREADABLE_SUFFIX = ".unreadable"
ROWS_MAX = 20_000
BYTES_MAX = 8 * 1024 * 1024
TABLES = """
create table if not exists windows (id integer primary key autoincrement, data blob not null, bytes integer not null);
create table if not exists counters (name text primary key, value integer);
insert or ignore into counters (name, value) values ('lost', 0);
"""
"""`autoincrement`: ids are never used again."""
BUSY_TIMEOUT_S = 5.0
"""How long to wait for somebody who looks into the file with another program."""


class Spooled(NamedTuple):
    """A window and the id to drop it by."""

    id: int
    window: TelemetryWindow


class Spool:
    """A first-in, first-out store of windows in one SQLite file. Thread-safe; each call is one transaction."""

    def __init__(self, path: Path, *, rows_max: int = ROWS_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._rows_max = rows_max
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._connection = _open(path)

    def add(self, windows: Iterable[TelemetryWindow]) -> None:
        """Keep `windows`, in their order; the oldest ones go if the spool is full.

        Raises `StorageFull`, with nothing changed, when the disk is.
        """
        rows = [(data, len(data)) for data in map(msgspec.json.encode, windows)]
        if rows:
            self._write(lambda: self._add(rows))

    def peek(self, limit: int) -> list[Spooled]:
        """The oldest windows, at most `limit`; they stay."""
        with self._lock:
            rows = self._connection.execute("select id, data from windows order by id limit ?", (limit,)).fetchall()
        return [Spooled(row_id, msgspec.json.decode(data, type=TelemetryWindow)) for row_id, data in rows]

    def drop(self, ids: Sequence[int]) -> None:
        """Forget windows that have arrived. Ids that are gone already are ignored; ids are never used twice."""
        self._write(lambda: self._connection.executemany("delete from windows where id = ?", [(i,) for i in ids]))

    @property
    def lost(self) -> int:
        """How many windows have been thrown away since the spool was made, because it was full."""
        return self._number("select value from counters where name = 'lost'")

    def __len__(self) -> int:
        return self._number("select count(*) from windows")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _add(self, rows: list[tuple[bytes, int]]) -> None:
        self._connection.executemany("insert into windows (data, bytes) values (?, ?)", rows)
        # Newest first, the rows whose place or running size is within the caps stay.
        gone = self._connection.execute(
            """
            delete from windows where id <= (
                select max(id) from (
                    select id,
                           row_number() over (order by id desc) as place,
                           sum(bytes) over (order by id desc rows unbounded preceding) as size
                    from windows
                ) where place > ? or size > ?
            )
            """,
            (self._rows_max, self._bytes_max),
        ).rowcount
        if gone:
            self._connection.execute("update counters set value = value + ? where name = 'lost'", (gone,))

    def _write(self, work: Callable[[], T]) -> T:
        with self._lock:
            try:
                with self._connection:
                    return work()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise StorageFull("no room left for telemetry", fix="free some space on the device") from error
                raise StorageFailed(f"telemetry cannot be kept: {error}", fix="make the disk writable") from error

    def _number(self, query: str) -> int:
        with self._lock:
            (number,) = self._connection.execute(query).fetchone()
        return int(number)


def counts(path: Path) -> tuple[int, int]:
    """How many windows wait in the spool at `path`, and how many are lost, without changing it; `sqlite3.Error`."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
        (waiting,) = connection.execute("select count(*) from windows").fetchone()
        (lost,) = connection.execute("select value from counters where name = 'lost'").fetchone()
    return int(waiting), int(lost)


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _prepared(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked, full, read-only: the file itself is fine
            logger.warning("telemetry is kept in memory: its file cannot be written", extra={"reason": str(error)})
            return _prepared(Path(":memory:"))
        logger.warning("the telemetry spool cannot be read; a new one is begun", extra={"path": str(path)})
        durable.move(path, path.with_name(path.name + UNREADABLE_SUFFIX))
        for suffix in ("-wal", "-shm"):
            durable.remove(path.with_name(path.name + suffix))
        return _prepared(path)


def _prepared(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        connection.executescript(TABLES)
        connection.execute("select count(*) from windows").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
