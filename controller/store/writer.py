"""The one writer: units of work that wait together share one commit.

An fsync costs more than a hundred small changes, so the thread takes all works that wait (up to `GROUP_WORKS_MAX`),
runs each in its own savepoint, commits once, and only then tells their callers. A work that raises is undone alone.
When the commit itself fails, or the database undid the whole transaction in the middle (SQLite does on a full disk),
nothing of the group is on the disk and every caller hears the reason; no work is run twice.
"""

import contextvars
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from common.clock import Clock
from common.errors import Unavailable
from controller.store.port import Transaction

GROUP_WORKS_MAX = 256
WAITING_WORKS_MAX = 4096
SLOW_WORK_S = 1.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


class _Work(Generic[T]):
    """A unit of work with the caller's context (so that traces go on inside) and the future its caller waits on."""

    def __init__(self, run: Callable[[Transaction], T]) -> None:
        self.future: Future[T] = Future()
        self._run = run
        self._context = contextvars.copy_context()

    def run(self, transaction: Transaction) -> T:
        return self._context.run(self._run, transaction)


class _Outcome(Generic[T]):
    """What a work returned or raised, held back until the group is durable."""

    def __init__(self, result: T | None = None, error: BaseException | None = None) -> None:
        self._result: Any = result
        self._error = error

    def tell(self, future: Future[T]) -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            future.set_exception(self._error)


class GroupWriter:
    """Runs works on one connection of `engine`, in the order they came.

    `transaction_on` makes the view of a connection that works get; `explain` turns a database error into one of ours.
    """

    def __init__(
        self,
        engine: sa.Engine,
        transaction_on: Callable[[sa.Connection], Transaction],
        explain: Callable[[BaseException], BaseException],
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._transaction_on = transaction_on
        self._explain = explain
        self._clock = clock
        self._waiting: deque[_Work[Any]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[Transaction], T]) -> Future[T]:
        """Queue a work; its future ends after the commit. `Unavailable` when the queue is full or closing.

        Cancelling the future before the work begins means that it never runs.
        """
        work = _Work(run)
        with self._changed:
            if self._closing:
                raise Unavailable("the database is closing")
            if len(self._waiting) >= WAITING_WORKS_MAX:
                raise Unavailable(f"{WAITING_WORKS_MAX} changes wait for the database already", fix="try again later")
            self._waiting.append(work)
            self._changed.notify()
        return work.future

    def close(self) -> None:
        """Finish the works that wait and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._next_group():
            begun = self._clock.monotonic()
            self._commit([work for work in group if work.future.set_running_or_notify_cancel()])
            took_s = self._clock.monotonic() - begun
            if took_s > SLOW_WORK_S:
                logger.warning("the database was slow", extra={"works": len(group), "took_s": round(took_s, 3)})

    def _next_group(self) -> list[_Work[Any]]:
        """Everything that waits, up to the limit; empty only when closing and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), GROUP_WORKS_MAX))]

    def _commit(self, group: list[_Work[Any]]) -> None:
        try:
            with self._engine.connect() as connection, connection.begin():
                transaction = self._transaction_on(connection)
                outcomes = [self._attempt(connection, transaction, work) for work in group]
        except Exception as error:  # noqa: BLE001 - whatever it is, every caller must hear it and the thread must live
            outcomes = [_Outcome(error=self._explain(error)) for _ in group]
        for work, outcome in zip(group, outcomes, strict=True):
            outcome.tell(work.future)

    def _attempt(self, connection: sa.Connection, transaction: Transaction, work: _Work[T]) -> _Outcome[T]:
        savepoint = connection.begin_nested()
        try:
            result = work.run(transaction)
            savepoint.commit()
        except Exception as error:  # noqa: BLE001 - it belongs to the caller who waits on the future
            savepoint.rollback()  # raises if the database has undone the whole transaction: then the group is lost
            return _Outcome(error=self._explain(error))
        return _Outcome(result)
