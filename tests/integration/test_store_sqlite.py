"""SQLite's own promises: what a crash, a full disk, a newer program or a foreign file do to the store."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from common.clock import SystemClock
from common.durable import write_file
from common.errors import Conflict, IntegrityFailure, InvalidInput, Unavailable
from common.ids import DeviceId
from controller.devices import Device
from controller.store import open_store, sql
from controller.store.port import Event, Store, Transaction
from controller.store.schema import metadata

ALICE = DeviceId("alice")


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ferry.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    opened = await open_store(url_of(path), SystemClock())
    yield opened
    await opened.close()


def put_alice(tx: Transaction, generation: int) -> None:
    tx.devices.put(Device(id=ALICE, created_at=1.0, generation=generation))


async def test_what_was_written_is_there_after_opening_again(path: Path) -> None:
    for generation in range(3):
        store = await open_store(url_of(path), SystemClock())
        device = await store.read(lambda tx: tx.devices.get(ALICE))
        assert (device.generation if device else 0) == generation
        await store.write(partial(put_alice, generation=generation + 1))
        await store.close()


async def test_only_the_owner_can_read_the_database(path: Path, store: Store) -> None:
    await store.write(lambda tx: tx.devices.put(Device(id=ALICE, created_at=1.0)))
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes) >= {"ferry.db", "ferry.db-wal"}
    assert set(modes.values()) == {0o600}


async def test_a_commit_waits_for_the_disk(path: Path) -> None:
    settings: set[tuple[object, object]] = set()

    def look(connection: sa.Connection) -> None:
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar()
        settings.add((connection.exec_driver_sql("PRAGMA journal_mode").scalar(), synchronous))

    sa.event.listen(sa.Engine, "begin", look)
    try:
        store = await open_store(url_of(path), SystemClock())
        await store.write(lambda tx: None)
        await store.close()
    finally:
        sa.event.remove(sa.Engine, "begin", look)
    assert settings == {("wal", 2)}  # 2 is FULL


WRITER = """
import asyncio, sys
from common.clock import SystemClock
from controller.store import open_store
from controller.store.port import Event

async def write_for_ever(store, number):
    while True:
        seq = await store.write(lambda tx: tx.journal.append_event(Event(kind="k", subject="s", at=float(number))))
        print(seq, flush=True)

async def main():
    store = await open_store(sys.argv[1], SystemClock())
    await asyncio.gather(*(write_for_ever(store, number) for number in range(8)))

asyncio.run(main())
"""


def killed_while_writing(path: Path, after: int) -> set[int]:
    """What a program that writes events was told is kept, until it was killed after `after` of them."""
    with subprocess.Popen([sys.executable, "-c", WRITER, url_of(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = {int(child.stdout.readline()) for _ in range(after)}
        child.send_signal(signal.SIGKILL)
        acknowledged |= {int(line) for line in child.stdout.read().split("\n")[:-1]}
    assert child.returncode == -signal.SIGKILL
    return acknowledged


async def test_everything_acknowledged_survives_a_kill(path: Path) -> None:
    acknowledged = await asyncio.to_thread(killed_while_writing, path, after=200)
    store = await open_store(url_of(path), SystemClock())
    kept = {event.seq for event in await store.read(lambda tx: tx.journal.events_after(0, 1_000_000))}
    await store.close()
    assert acknowledged <= kept
    assert kept == set(range(1, len(kept) + 1))


FILLER = """
import asyncio, json, resource, sys
from common.clock import SystemClock
from common.errors import StorageFull
from controller.store import open_store
from controller.store.port import Event

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def append(tx):
    return tx.journal.append_event(Event(kind="k", subject="s" * 5000, at=0.0))

async def main():
    store = await open_store(sys.argv[1], SystemClock())
    written = 0
    limit(512 * 1024)
    try:
        while written < 10_000:
            await store.write(append)
            written += 1
        error = "none"
    except StorageFull as full:
        error = str(full)
    readable = len(await store.read(lambda tx: tx.journal.events_after(0, 100_000)))
    limit(resource.RLIM_INFINITY)
    after = await store.write(append)
    await store.close()
    print(json.dumps([error, written, readable, after]))

asyncio.run(main())
"""


def test_a_full_disk_is_named_and_what_was_there_stays_usable(path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FILLER, url_of(path)], capture_output=True, text=True, check=True)
    error, written, readable, after = json.loads(run.stdout)
    assert str(path) in error and "takes no more bytes" in error and "free some space" in error
    assert 0 < written < 10_000
    assert readable == written
    assert after == written + 1


async def test_a_database_of_a_newer_program_is_refused_and_left_alone(path: Path) -> None:
    await (await open_store(url_of(path), SystemClock())).close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v9999'")
    database.close()
    before = content(path)
    with pytest.raises(Conflict, match=r"newer Edgeferry \(schema v9999\)") as refused:
        await open_store(url_of(path), SystemClock())
    assert refused.value.fix is not None and "backup" in refused.value.fix
    assert content(path) == before


async def test_the_migrations_make_the_tables_that_the_program_expects(path: Path, store: Store) -> None:
    engine = sa.create_engine(url_of(path))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


async def test_two_that_open_a_new_database_at_once_both_get_it(path: Path) -> None:
    stores = await asyncio.gather(*(open_store(url_of(path), SystemClock()) for _ in range(4)))
    await asyncio.gather(*(store.write(lambda tx: tx.devices.get(ALICE)) for store in stores))
    for store in stores:
        await store.close()


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "postgresql://localhost/ferry"])
async def test_a_url_that_cannot_be_used_is_refused_with_the_form_that_can(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await open_store(url, SystemClock())
    assert refused.value.field == "database"
    assert "sqlite:///" in str(refused.value.fix)


async def test_a_password_in_a_url_is_not_repeated_in_the_error() -> None:
    with pytest.raises(InvalidInput) as refused:
        await open_store("postgresql://ada:secret@localhost/ferry", SystemClock())
    assert "secret" not in str(refused.value)


async def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file or directory"):
        await open_store(url_of(tmp_path / "missing" / "ferry.db"), SystemClock())


async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    notes = b"these are my holiday notes" * 100
    write_file(path, notes)
    with pytest.raises(IntegrityFailure, match="not a database"):
        await open_store(url_of(path), SystemClock())
    assert content(path) == notes


async def test_a_document_that_cannot_be_read_is_an_integrity_failure(path: Path, store: Store) -> None:
    await store.write(lambda tx: tx.devices.put(Device(id=ALICE, created_at=1.0)))
    with sqlite3.connect(path) as database:
        database.execute("""UPDATE devices SET document = '{"id": 7}'""")
    database.close()
    with pytest.raises(IntegrityFailure, match="cannot be read"):
        await store.read(lambda tx: tx.devices.get(ALICE))


async def test_a_lock_of_another_program_is_transient(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "BUSY_TIMEOUT_MS", 20)
    store = await open_store(url_of(path), SystemClock())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked by another program"):
        await store.write(lambda tx: tx.devices.put(Device(id=ALICE, created_at=1.0)))
    other.execute("ROLLBACK")
    other.close()
    await store.write(lambda tx: tx.devices.put(Device(id=ALICE, created_at=1.0)))
    await store.close()


async def test_a_backup_with_the_sqlite_tool_is_complete(path: Path, store: Store, tmp_path: Path) -> None:
    await store.write(lambda tx: tx.journal.append_event(Event(kind="k", subject="s", at=1.0)))
    source, target = sqlite3.connect(path), sqlite3.connect(tmp_path / "backup.db")
    source.backup(target)
    source.close()
    target.close()
    restored = await open_store(url_of(tmp_path / "backup.db"), SystemClock())
    assert len(await restored.read(lambda tx: tx.journal.events_after(0, 9))) == 1
    await restored.close()


def test_the_port_can_be_imported_without_a_database_library() -> None:
    look = "import sys, controller.store, controller.store.port; sys.exit('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], env=dict(os.environ), check=False).returncode == 0


def test_every_table_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/storage.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert documented == set(metadata.tables)
