"""What the agent must still know after its power was cut: a SQLite file, synchronous FULL, written before each effect.

It holds one row per model (its `ModelState` as JSON), the newest accepted order exactly as it was signed, and a few
numbers that only ever grow (generation, connection epoch, 304 answers). When a method returns, what it wrote is on the
disk. The methods may be called from any thread, one at a time.

A row that this build cannot read was written by a newer one, or is damaged. Then only the installed release is kept of
it, and the newest order is carried out afresh: a state that nobody knows means going back to what is proven.
"""

import logging
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from common.durable import explaining_full_disk
from common.errors import Conflict, StorageFull
from common.ids import ModelName
from common.trust import is_newer
from edge_agent.update import Installed, ModelState

logger = logging.getLogger(__name__)

FILE_NAME = "journal.db"
BUSY_S = 10.0
"""How long to wait for `ferry-agent status`, which reads the same file."""

migrations = Migrations("journal")


@migrations()
def create_tables(db: Database) -> None:
    db.table("models").create({"model": str, "state": str}, pk="model", strict=True)
    db.table("numbers").create({"name": str, "value": int}, pk="name", strict=True)
    db.table("orders").create(
        {"id": int, "generation": int, "etag": str, "envelope": bytes}, pk="id", not_null={"envelope"}, strict=True
    )


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
    """The agent's durable memory; see the module's text."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        with explaining_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
        self._db = Database(connection)
        self._db.enable_wal()
        self._db.execute("PRAGMA synchronous = FULL")
        migrations.apply(self._db)

    def close(self) -> None:
        """Let the file go."""
        with self._lock:
            self._db.close()

    def begin_run(self, boot: int = 0) -> LastRun:
        """Note that the program runs, on a machine whose present run is known by the number `boot`."""
        last = LastRun(clean=self.number("running") == 0, rebooted=self.number("boot") != boot)
        self._set({"running": 1, "boot": boot})
        return last

    def end_run(self) -> None:
        """Note that the program ends in good order."""
        self._set({"running": 0})

    def load(self) -> dict[ModelName, ModelState]:
        """What is known of every model."""
        with self._lock:
            rows = list(self._db.table("models").rows)
        states = (_state(row["state"]) for row in rows)
        return {state.model: state for state in states if state is not None}

    def save(self, state: ModelState) -> None:
        """Remember `state` instead of what was known of the model."""
        row = {"model": state.model, "state": msgspec.json.encode(state).decode()}
        self._write(lambda db: db.table("models").upsert(row, pk="model"))

    def forget(self, model: ModelName) -> None:
        """Remember nothing of a retired model."""
        self._write(lambda db: db.execute("DELETE FROM models WHERE model = ?", [model]))

    @property
    def order(self) -> AcceptedOrder | None:
        """The newest accepted order."""
        with self._lock:
            rows = list(self._db.query("SELECT generation, etag, envelope FROM orders WHERE id = 1"))
        return AcceptedOrder(**rows[0]) if rows else None

    @property
    def generation(self) -> int:
        """The highest generation ever accepted."""
        return self.number("generation")

    def accept(self, order: AcceptedOrder) -> None:
        """Remember `order` as the newest. Raises `Conflict` unless its generation is the highest ever."""
        highest = self.generation
        if not is_newer(order.generation, highest):
            raise Conflict(f"generation {order.generation} is not above {highest}", field="generation")

        def write(db: Database) -> None:
            db.table("orders").upsert({"id": 1, **msgspec.to_builtins(order, builtin_types=(bytes,))}, pk="id")
            db.table("numbers").upsert({"name": "generation", "value": order.generation}, pk="name")

        self._write(write)

    def count(self, name: str) -> int:
        """The number `name`, raised by one first: a value that no earlier run has had."""
        value = self.number(name) + 1
        self._set({name: value})
        return value

    def number(self, name: str) -> int:
        """The number `name`; 0 before it was first counted."""
        with self._lock:
            found = self._db.execute("SELECT value FROM numbers WHERE name = ?", [name]).fetchone()
        return int(found[0]) if found else 0

    def _set(self, numbers: Mapping[str, int]) -> None:
        rows = [{"name": name, "value": value} for name, value in numbers.items()]
        self._write(lambda db: db.table("numbers").upsert_all(rows, pk="name"))

    def _write(self, work: Any) -> None:
        try:
            with self._lock, self._db.atomic():
                work(self._db)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", None) in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}:
                fix = "free some space; nothing was lost"
                raise StorageFull(f"no room for the journal in {self._path.parent}", fix=fix) from error
            raise


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
