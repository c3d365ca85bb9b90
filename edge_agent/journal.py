"""What the agent must still know after its power was cut: a SQLite file, synchronous FULL, written before each effect.

It holds one row per model (its `ModelState` as JSON), the newest accepted order exactly as it was signed, and a few
numbers that only ever grow (generation, connection epoch, 304 answers). When a method returns, what it wrote is on the
disk. The methods may be called from any thread, one at a time.

A disk that takes nothing, because it is full, read-only or failing, is `StorageFull` or `StorageFailed` where something
must be written, and no reason not to start: what the journal holds can be read then too, if need be from a copy in
memory. Numbers that could not be written go with the next write that works.

A file that is damaged is set aside and a new one begun (`begun_anew`): which releases there are can be seen in the
slots, and the highest generation is in a small file of its own too, so that no old order is believed again.

A row that this build cannot read was written by a newer one, or is damaged. Then only the installed release is kept of
it, and the newest order is carried out afresh: a state that nobody knows means going back to what is proven.
"""

import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from common.durable import make_folder, move, remove, write_file
from common.errors import Conflict, IntegrityFailure, StorageFailed, StorageFull
from common.ids import ModelName
from common.trust import is_newer
from edge_agent.update import Installed, ModelState

logger = logging.getLogger(__name__)

FILE_NAME = "journal.db"
UNREADABLE = ".unreadable"
MEMORY = Path("/dev/shm")  # noqa: S108 (a private folder is made in it)
"""Where a copy of a journal goes that cannot be opened where it is; the usual temporary folder if it is not there."""
FIX = "make its disk writable again; what is installed keeps running, nothing was lost"
BUSY_S = 10.0
"""How long to wait for `ferry-agent status`, which reads the same file."""

TABLES = """
CREATE TABLE IF NOT EXISTS models (model TEXT PRIMARY KEY, state TEXT) STRICT;
CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value INTEGER) STRICT;
CREATE TABLE IF NOT EXISTS orders
    (id INTEGER PRIMARY KEY, generation INTEGER, etag TEXT, envelope BLOB NOT NULL) STRICT;
"""
# Upserts, because a replaced row would lose the columns of a later format.
SAVE_MODEL = "INSERT INTO models (model, state) VALUES (?, ?) ON CONFLICT DO UPDATE SET state = excluded.state"
SAVE_NUMBER = "INSERT INTO numbers (name, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value"
SAVE_ORDER = """
INSERT INTO orders (id, generation, etag, envelope) VALUES (1, ?, ?, ?) ON CONFLICT DO UPDATE
SET generation = excluded.generation, etag = excluded.etag, envelope = excluded.envelope
"""


class AcceptedOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The newest accepted order; `etag` is its digest, with which a poll asks whether there is a newer one."""

    generation: int
    etag: str
    envelope: bytes


class LastRun(NamedTuple):
    """How the program's last run ended: `clean`, in good order (also before the first); `rebooted`, whether the machine
    was started anew since.
    """

    clean: bool
    rebooted: bool

    @property
    def power_cut(self) -> bool:
        """Whether what was not synced may be gone."""
        return self.rebooted and not self.clean


class Salvaged(msgspec.Struct, frozen=True):
    """What is kept of a row that cannot be read as a whole."""

    model: ModelName
    installed: Installed | None = None


class Journal:
    """The agent's durable memory; see the module's text.

    Who only looks (`repair` is false) changes nothing of a damaged one and gets an `IntegrityFailure`.
    """

    def __init__(self, path: Path, *, repair: bool = True) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._unwritten: dict[str, int] = {}
        self.begun_anew = False
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        try:
            make_folder(path.parent)
            self._db = _open(path)
        except (sqlite3.OperationalError, OSError) as error:
            if not path.exists():
                raise _refusal(error, path) from error
            logger.warning("the journal is on a disk that takes nothing", extra={"reason": str(error)})
            self._copy = tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)
            self._db = _open(_copied(path, Path(self._copy.name)))
        except sqlite3.DatabaseError as error:
            if not repair:
                raise IntegrityFailure(
                    f"{path} is damaged: {error}", fix="start the agent: it begins a new one"
                ) from error
            logger.error("the journal is damaged; a new one is begun", extra={"reason": str(error)})  # noqa: TRY400
            self._db = self._begin_anew()

    def _begin_anew(self) -> sqlite3.Connection:
        path = self._path
        move(path, path.with_name(path.name + UNREADABLE))
        for suffix in ("-wal", "-shm"):
            remove(path.with_name(path.name + suffix))
        self.begun_anew = True
        with contextlib.suppress(OSError, ValueError):  # the newest order itself is lost and must be accepted once more
            self._unwritten["generation"] = int(self._generation_file.read_text(encoding="ascii")) - 1
        return _open(path)

    @property
    def _generation_file(self) -> Path:
        return self._path.with_name(self._path.name + ".generation")

    def close(self) -> None:
        """Let the file go."""
        with self._lock:
            self._db.close()
        if self._copy is not None:
            self._copy.cleanup()

    def begin_run(self, boot: int = 0) -> LastRun:
        """Note that the program runs, on a machine whose present run is known by the number `boot`."""
        last = LastRun(clean=self.number("running") == 0, rebooted=self.number("boot") != boot)
        self._note({"running": 1, "boot": boot})
        return last

    def end_run(self) -> None:
        """Note that the program ends in good order."""
        self._note({"running": 0})

    def load(self) -> dict[ModelName, ModelState]:
        """What is known of every model."""
        with self._lock:
            rows = self._db.execute("SELECT state FROM models").fetchall()
        states = (_state(text) for (text,) in rows)
        return {state.model: state for state in states if state is not None}

    def save(self, state: ModelState) -> None:
        """Remember `state` instead of what was known of the model."""
        row = (state.model, msgspec.json.encode(state).decode())
        self._write(lambda db: db.execute(SAVE_MODEL, row))

    def forget(self, model: ModelName) -> None:
        """Remember nothing of a retired model."""
        self._write(lambda db: db.execute("DELETE FROM models WHERE model = ?", [model]))

    @property
    def order(self) -> AcceptedOrder | None:
        """The newest accepted order."""
        with self._lock:
            row = self._db.execute("SELECT generation, etag, envelope FROM orders WHERE id = 1").fetchone()
        return AcceptedOrder(generation=row[0], etag=row[1], envelope=row[2]) if row else None

    @property
    def generation(self) -> int:
        """The highest generation ever accepted."""
        return self.number("generation")

    def accept(self, order: AcceptedOrder) -> None:
        """Remember `order` as the newest. Raises `Conflict` unless its generation is the highest ever."""
        highest = self.generation
        if not is_newer(order.generation, highest):
            raise Conflict(f"generation {order.generation} is not above {highest}", field="generation")

        def write(db: sqlite3.Connection) -> None:
            db.execute(SAVE_ORDER, (order.generation, order.etag, order.envelope))
            db.execute(SAVE_NUMBER, ("generation", order.generation))

        self._write(write)
        with contextlib.suppress(StorageFull, OSError):  # only of use when the journal is lost
            write_file(self._generation_file, str(order.generation).encode())

    def count(self, name: str) -> int:
        """The number `name`, raised by one first: a value that no earlier run has had, if the disk took theirs."""
        value = self.number(name) + 1
        self._note({name: value})
        return value

    def number(self, name: str) -> int:
        """The number `name`; 0 before it was first counted."""
        with self._lock:
            if name in self._unwritten:
                return self._unwritten[name]
            found = self._db.execute("SELECT value FROM numbers WHERE name = ?", [name]).fetchone()
        return int(found[0]) if found else 0

    def _note(self, numbers: Mapping[str, int]) -> None:
        """Write numbers that nothing waits for: with the next write, if the disk does not take them now."""
        with self._lock:
            self._unwritten |= numbers
        try:
            self._write(lambda _: None)
        except (StorageFull, StorageFailed) as error:
            logger.warning("the journal could not be written and goes on in memory", extra={"reason": str(error)})

    def _write(self, work: Callable[[sqlite3.Connection], object]) -> None:
        if self._copy is not None:
            raise StorageFailed(f"the journal in {self._path.parent} cannot be written", fix=FIX)
        try:
            with self._lock:
                with self._db:
                    self._db.executemany(SAVE_NUMBER, self._unwritten.items())
                    work(self._db)
                self._unwritten.clear()
        except sqlite3.OperationalError as error:
            raise _refusal(error, self._path) from error


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(TABLES)
        (verdict,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)  # noqa: TRY301
    except BaseException:
        database.close()
        raise
    return database


def _copied(path: Path, folder: Path) -> Path:
    """The journal in another folder, as far as it had been written."""
    for suffix in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(path.with_name(path.name + suffix), folder / (path.name + suffix))
    return folder / path.name


def _refusal(error: Exception, path: Path) -> StorageFull | StorageFailed:
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    if full or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return StorageFull(f"no room for the journal in {path.parent}", fix="free some space; nothing was lost")
    return StorageFailed(f"the journal in {path.parent} cannot be written: {error}", fix=FIX)


def _state(text: str) -> ModelState | None:
    try:
        return msgspec.json.decode(text, type=ModelState)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning(
            "a journal row cannot be read; going back to the installed release", extra={"reason": str(error)}
        )
    try:
        salvaged = msgspec.json.decode(text, type=Salvaged)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return ModelState(model=salvaged.model, installed=salvaged.installed)
