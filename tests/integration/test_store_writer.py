"""How the one writer groups works: who shares a commit, who waits, and who hears of a failure."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from opentelemetry import context

from common.clock import SystemClock
from common.errors import Unavailable
from common.ids import DeviceId
from controller.devices import Device
from controller.store import migrate, sql
from controller.store.port import Transaction
from controller.store.writer import GROUP_WORKS_MAX, WAITING_WORKS_MAX, GroupWriter

WAIT_S = 30


class Bench:
    """A writer on a real database, whose next group can be held back until it is let go."""

    def __init__(self, path: Path) -> None:
        self.engine = sql.sqlite_engine(sa.make_url(f"sqlite:///{path}"), "IMMEDIATE", connections=1, pragmas=())
        with self.engine.connect() as connection, connection.begin():
            migrate.upgrade(connection, str(path))
        self.commits = 0
        self.connections: list[sa.Connection] = []
        sa.event.listen(self.engine, "commit", self._count)
        self.writer = GroupWriter(self.engine, self._transaction_on, lambda error: error, SystemClock())
        self._gate = threading.Event()

    def hold(self) -> Future[None]:
        """Keep the writer busy until `let_go`."""
        begun = threading.Event()

        def wait(_tx: Transaction) -> None:
            begun.set()
            assert self._gate.wait(WAIT_S)

        future = self.writer.submit(wait)
        assert begun.wait(WAIT_S)
        return future

    def let_go(self) -> None:
        self._gate.set()

    def devices(self) -> list[DeviceId]:
        return self.writer.submit(lambda tx: [device.id for device in tx.devices.all()]).result(WAIT_S)

    def close(self) -> None:
        self.let_go()
        self.writer.close()
        self.engine.dispose()

    def _transaction_on(self, connection: sa.Connection) -> Transaction:
        self.connections.append(connection)
        return sql.SqlTransaction(connection)

    def _count(self, _connection: sa.Connection) -> None:
        self.commits += 1


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "ferry.db")
    yield made
    made.close()


def put(name: str) -> Callable[[Transaction], None]:
    return lambda tx: tx.devices.put(Device(id=DeviceId(name), created_at=1.0))


def test_works_that_wait_together_share_one_commit(bench: Bench) -> None:
    held = bench.hold()
    futures = [bench.writer.submit(put(f"device-{number}")) for number in range(50)]
    assert not any(future.done() for future in futures)
    bench.let_go()
    for future in (held, *futures):
        future.result(WAIT_S)
    assert bench.commits == 2


def test_a_group_is_bounded(bench: Bench) -> None:
    bench.hold()
    futures = [bench.writer.submit(put(f"device-{number}")) for number in range(GROUP_WORKS_MAX + 1)]
    bench.let_go()
    for future in futures:
        future.result(WAIT_S)
    assert bench.commits == 3


def test_when_too_many_wait_the_next_is_turned_away(bench: Bench) -> None:
    bench.hold()
    futures = [bench.writer.submit(lambda tx: None) for _ in range(WAITING_WORKS_MAX)]
    with pytest.raises(Unavailable, match="wait for the database"):
        bench.writer.submit(put("one too many"))
    bench.let_go()
    for future in futures:
        future.result(WAIT_S)
    assert bench.devices() == []


def test_a_work_cancelled_before_its_turn_never_runs(bench: Bench) -> None:
    bench.hold()
    cancelled, kept = bench.writer.submit(put("cancelled")), bench.writer.submit(put("kept"))
    assert cancelled.cancel()
    bench.let_go()
    kept.result(WAIT_S)
    with pytest.raises(CancelledError):
        cancelled.result(WAIT_S)
    assert bench.devices() == ["kept"]


def test_when_the_database_undoes_the_transaction_every_caller_of_the_group_hears_it(bench: Bench) -> None:
    """SQLite may end a transaction by itself, for example when the disk is full: savepoints are gone then."""
    bench.hold()

    def undo_everything(_tx: Transaction) -> None:
        bench.connections[-1].exec_driver_sql("ROLLBACK")
        raise OSError("the disk is on fire")

    futures = [bench.writer.submit(work) for work in (put("before"), undo_everything, put("after"))]
    bench.let_go()
    for future in futures:
        with pytest.raises(sa.exc.OperationalError, match="savepoint"):
            future.result(WAIT_S)
    assert bench.devices() == []
    bench.writer.submit(put("later")).result(WAIT_S)
    assert bench.devices() == ["later"]


def test_a_work_runs_in_the_context_of_its_caller(bench: Bench) -> None:
    token = context.attach(context.set_value("who", "ada"))
    seen = bench.writer.submit(lambda tx: context.get_value("who"))
    context.detach(token)
    assert seen.result(WAIT_S) == "ada"


def test_results_come_only_after_the_commit(bench: Bench) -> None:
    order: list[str] = []
    sa.event.listen(bench.engine, "commit", lambda connection: order.append("commit"))
    bench.hold()
    futures = [bench.writer.submit(put(f"device-{number}")) for number in range(3)]
    for number, future in enumerate(futures):
        future.add_done_callback(partial(lambda number, future: order.append(f"told {number}"), number))
    bench.let_go()
    bench.devices()
    assert order[:5] == ["commit", "commit", "told 0", "told 1", "told 2"]
