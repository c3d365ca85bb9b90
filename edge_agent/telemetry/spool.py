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
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec

from common import durable
from common.errors import StorageFailed, StorageFull
from common.wire import DeviceWindow, TelemetryWindow

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILE_NAME = "telemetry.db"
UNREADABLE_SUFFIX = ".unreadable"
ROWS_MAX = 20_000
BYTES_MAX = 8 * 1024 * 1024
TABLES = """
create table if not exists windows (
    id integer primary key autoincrement, kind text not null, data blob not null, bytes integer not null
);
create table if not exists counters (name text primary key, value integer);
insert or ignore into counters (name, value) values ('lost', 0);
"""
"""`autoincrement`: ids are never used again."""
BUSY_TIMEOUT_S = 5.0
"""How long to wait for somebody who looks into the file with another program."""


Window: TypeAlias = TelemetryWindow | DeviceWindow

KINDS: dict[str, type[TelemetryWindow] | type[DeviceWindow]] = {"release": TelemetryWindow, "device": DeviceWindow}
_NAMES = {kind: name for name, kind in KINDS.items()}


class Spooled(NamedTuple):
    """A window and the id to drop it by; `size` is its length in bytes, encoded."""

    id: int
    size: int
    window: Window


class Spool:
    """A first-in, first-out store of windows in one SQLite file. Thread-safe; each call is one transaction."""

    def __init__(self, path: Path, *, rows_max: int = ROWS_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._rows_max = rows_max
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._connection = _open(path)

    def add(self, windows: Iterable[Window]) -> None:
        """Keep `windows`, in their order; the oldest ones go if the spool is full.

        Raises `StorageFull`, with nothing changed, when the disk is.
        """
        encoded = [(_NAMES[type(window)], msgspec.json.encode(window)) for window in windows]
        rows = [(kind, data, len(data)) for kind, data in encoded]
        if rows:
            self._write(lambda: self._add(rows))

    def peek(self, limit: int, bytes_max: int | None = None) -> list[Spooled]:
        """The oldest windows, at most `limit`, and of more than one at most `bytes_max` together; they stay."""
        query = "select id, kind, data from windows order by id limit ?"
        found: list[Spooled] = []
        size = 0
        with self._lock:
            rows = self._connection.execute(query, (limit,)).fetchall()
        for row_id, kind, data in rows:
            size += len(data)
            if found and bytes_max is not None and size > bytes_max:
                break
            found.append(Spooled(row_id, len(data), msgspec.json.decode(data, type=KINDS[kind])))
        return found

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

    def _add(self, rows: list[tuple[str, bytes, int]]) -> None:
        self._connection.executemany("insert into windows (kind, data, bytes) values (?, ?, ?)", rows)
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
