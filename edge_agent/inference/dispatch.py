"""The threads that run requests: one for each core, fed from one bounded queue; and callers who run their own.

A caller's own thread may take a free core (`try_run`) when nothing waits: then nobody hands anything over. All others
wait in `Waiting` and are taken in batches. What a batch is, and what is done with it, is the owner's (`Owner`); nothing
here knows about models.
"""

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Any, Final, Protocol

from common.clock import Clock
from edge_agent.inference.scheduling import Taken, Ticket, Waiting, WaitingFull, WaitingLimits
from edge_agent.inference.turns import Turn

OVERSEE_S: Final = 1.0
"""Between two looks at what has run for too long."""


class Owner(Protocol):
    """Whose tickets these are; called on the dispatcher's threads, `rows_for` under its lock."""

    def rows_for(self, first: Ticket, waiting: int) -> int:
        """How many of `waiting` rows like those of `first` to run together."""
        ...

    def is_short(self, works: Sequence[Any]) -> bool:
        """Whether `run` is expected to take next to no time."""
        ...

    def took(self, works: Sequence[Any], seconds: float) -> None:
        """How long `run` took, where it was asked whether it is short."""
        ...

    def run(self, works: Sequence[Any]) -> None:
        """Run and answer the works of one batch; must not raise."""
        ...

    def stop(self, thread: int, works: Sequence[Any]) -> None:
        """`thread` has run `works` for too long: let it end. Called under the dispatcher's lock, perhaps repeatedly."""
        ...

    def refuse(self, ticket: Ticket, *, late: bool) -> None:
        """Tell that `ticket` will not run: its deadline has passed, or there is no room."""
        ...


class Dispatcher:
    """`cores` requests or batches at one time, none of them for more than about `run_s_max` seconds.

    The methods may be called from any thread.
    """

    def __init__(self, cores: int, limits: WaitingLimits, run_s_max: float, owner: Owner, clock: Clock) -> None:
        self._owner = owner
        self._clock = clock
        self._run_s_max = run_s_max
        self._running: dict[int, tuple[Sequence[Any], float]] = {}  # what each thread runs, and since when
        self._pulses: list[Future[None]] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        # Idle threads wait here: one that a condition woke would wait once more, for the lock of who woke it.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._idle = 0
        self._waiting = Waiting(limits)
        self._cores = cores
        self._free = cores
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"inference-{number}", daemon=True) for number in range(cores)
        ]
        self._threads.append(threading.Thread(target=self._oversee, name="inference-overseer", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Cores that run something."""
        return self._cores - self._free

    @property
    def free(self) -> bool:
        """Whether a core is free and nobody waits for one; by the time it is known that may have changed."""
        return self._free > 0 and not len(self._waiting)

    def try_run(self, work: Any) -> bool:
        """Run `work` on the calling thread, if a core is free and nobody waits; whether it was."""
        works = (work,)
        with self._lock:
            if self._free == 0 or len(self._waiting) or self._closed:
                return False
            self._begin(works)
        try:
            self._owner.run(works)
        finally:
            self._call(self._end())
        return True

    def run_on(self, work: Any, turn: Turn) -> bool:
        """`try_run`, and then what waits by then, until nothing does: for a thread that has nothing better to do. The
        core goes from one to the next, and nobody is woken for it while the thread keeps its turn.
        """
        with self._lock:
            if self._free == 0 or len(self._waiting) or self._closed:
                return False
            self._begin((work,))
        self._carry_on([], (work,), turn)
        return True

    def serve(self, tickets: Sequence[Ticket], turn: Turn) -> None:
        """`submit`, and then as `run_on` what waits, if a core is free."""
        with self._lock:
            refused = self._queue(tickets)
            taken = self._take() if self._free and len(self._waiting) else None
        for ticket in refused:
            self._owner.refuse(ticket, late=False)
        if taken:
            self._carry_on(taken.late, _works(taken.batch), turn)

    def _carry_on(self, late: Sequence[Ticket], works: Sequence[Any], turn: Turn | None = None) -> None:
        """Run on the calling thread, which has a core, and then what waits by then, until nothing does."""
        while True:
            try:
                for ticket in late:
                    self._owner.refuse(ticket, late=True)
                if works and turn:
                    self._run_in(turn, works)
                elif works:
                    self._owner.run(works)
            except BaseException:
                self._call(self._end())  # whatever it was, the core must not be lost
                raise
            with self._lock:
                self._leave()
                if not len(self._waiting):
                    called = self._called(self._idle) if self._closed else 0
                    break
                taken = self._take()
            late, works = taken.late, _works(taken.batch)
        self._call(called)

    def _run_in(self, turn: Turn, works: Sequence[Any]) -> None:
        """Run on a thread whose turn it is: if it ends, what still waits is for others."""
        if not turn.begins(short=self._owner.is_short(works)):
            with self._lock:
                called = self._called(min(len(self._waiting), self._free))
            self._call(called)
        began = self._clock.monotonic()
        try:
            self._owner.run(works)
        finally:
            turn.ended_run()
        self._owner.took(works, self._clock.monotonic() - began)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Let `tickets` wait for a core; those for which there is no room are refused, or less urgent ones are."""
        with self._lock:
            refused = self._queue(tickets)
            called = self._called(min(len(tickets), self._free))  # without a core there is nothing to do
        self._call(called)
        for ticket in refused:
            self._owner.refuse(ticket, late=False)

    def _queue(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Let them wait; returns whom there is no room for."""
        refused: list[Ticket] = []
        for ticket in tickets:
            try:
                refused += self._waiting.add(ticket, self._free)
            except WaitingFull:
                refused.append(ticket)
        return refused

    def pulse(self) -> "Future[None]":
        """Done when a core is free, or comes free: not every core has a model that hangs."""
        future: Future[None] = Future()
        with self._lock:
            self._pulses.append(future)
            called = self._called(1)
        self._call(called)
        return future

    def cancel(self, ticket: Ticket) -> bool:
        """Nobody waits for `ticket` any more: whether it will not run because of that."""
        with self._lock:
            return self._waiting.remove(ticket)

    def close(self) -> None:
        """Run what waits, then end the threads. Returns at once."""
        with self._lock:
            self._closed = True
            called = self._called(self._idle)
        self._call(called)
        self._ended.set()

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            self._carry_on(taken.late, _works(taken.batch))

    def _next(self) -> Taken | None:
        """What to do next, with a core for it; None when there is nothing more to do."""
        while True:
            with self._lock:
                if self._free:
                    self._answer_pulses()
                if len(self._waiting) and self._free:
                    return self._take()
                if self._closed and not len(self._waiting):
                    return None
                self._idle += 1
            self._calls.get()

    def _take(self) -> Taken:
        free = self._free
        taken = self._waiting.take(
            self._clock.monotonic(), lambda first, rows: self._owner.rows_for(first, -(-rows // free))
        )
        self._begin(_works(taken.batch))
        return taken

    def _called(self, wanted: int) -> int:
        """How many idle threads there are to call, up to `wanted`; they count as called. Under the lock."""
        called = min(wanted, self._idle)
        self._idle -= called
        return called

    def _call(self, threads: int) -> None:
        """Let idle threads look for work. Not under the lock, because it is the first thing that they take."""
        for _ in range(threads):
            self._calls.put(None)

    def _answer_pulses(self) -> None:
        for pulse in self._pulses:
            with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
                pulse.set_result(None)
        self._pulses.clear()

    def _begin(self, works: Sequence[Any]) -> None:
        self._free -= 1
        self._running[threading.get_ident()] = works, self._clock.monotonic()

    def _end(self) -> int:
        """The core is free again; returns how many threads to call: for what waits, or to end."""
        with self._lock:
            self._leave()
            waiting = len(self._waiting)
            return self._called(self._idle if self._closed else min(waiting, self._free))

    def _leave(self) -> None:
        del self._running[threading.get_ident()]
        self._free += 1
        if self._pulses:
            self._answer_pulses()

    def _oversee(self) -> None:
        """A model may loop for ever on one input; a core that it holds would be lost."""
        while not self._ended.wait(OVERSEE_S):
            with self._lock:
                latest = self._clock.monotonic() - self._run_s_max
                for thread, (works, since) in self._running.items():
                    if since <= latest:
                        self._owner.stop(thread, works)


def _works(batch: Sequence[Ticket]) -> list[Any]:
    return [ticket.work for ticket in batch]
