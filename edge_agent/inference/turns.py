"""Whose turn it is: of the threads that serve the inference API, one at a time reads, runs what is short and answers.

Threads that do this beside each other mostly wait for Python's lock. Every system call offers it to the others, and for
a model that takes 0.1 ms these hand-overs cost more than the model does. So a thread keeps its turn while it runs what
is expected to be short, and ends it before it runs anything else: then the next thread reads.

A thread that runs what waits may never be done, if others ask faster than it answers: so a turn is kept for a number of
runs at most. And an expectation may be wrong: a thread that kept its turn in a model that hangs would take the API with
it. So a turn is kept only while another thread watches, which ends a turn whose run takes too long. It watches as long
as there are runs; without traffic all threads sleep.

Knows nothing of connections, requests or models.
"""

import threading
from typing import Final

LOOK_S: Final = 0.02
"""Between two looks of the thread that watches; a run that two of them see costs its thread the turn."""
RUNS_MAX: Final = 32
"""Runs that a turn is kept for until its thread reads again."""
QUIET_LOOKS_MAX: Final = 50
"""Looks at which nothing has run since the one before; then the watch ends."""


class Turn:
    """The time of one thread. Only `end` may be called by others."""

    __slots__ = ("_held", "_left", "_turns", "run")

    def __init__(self, turns: "Turns", lock: threading.Lock) -> None:
        self._turns = turns
        self._held = [lock]
        self._left = RUNS_MAX
        self.run = 0
        """The number of the run that it is kept for; 0 when there is none."""

    @property
    def over(self) -> bool:
        """Whether it has been ended."""
        return not self._held

    def reads(self) -> None:
        """The thread has read what has come in."""
        self._left = RUNS_MAX

    def begins(self, *, short: bool) -> bool:
        """The thread is going to run something; whether the turn is kept. `ended_run` follows."""
        self._left -= 1
        if short and self._held and self._left >= 0:
            self._turns.runs += 1
            self.run = self._turns.runs
            if self._turns.watched:  # only now: the watch ends if it sees no run after it has said so
                return True
            self.run = 0
        self.end()
        return False

    def ended_run(self) -> None:
        """The run is over."""
        self.run = 0

    def end(self) -> None:
        """Let the next thread have its turn. Once: later calls do nothing."""
        try:
            lock = self._held.pop()
        except IndexError:
            return
        lock.release()


class Turns:
    """The order of the threads. `take` may be called from any; the rest is for `Turn`."""

    def __init__(self) -> None:
        self.watched = False
        self.runs = 0
        """How many have begun for which a turn was kept."""
        self._lock = threading.Lock()
        self._watch = threading.Lock()
        self._now: Turn | None = None

    def take(self) -> Turn:
        """Return when it is the calling thread's turn."""
        if not self._lock.acquire(blocking=False):
            self._wait()
        self._now = Turn(self, self._lock)
        return self._now

    def _wait(self) -> None:
        """For the lock; one of those who wait watches."""
        if self._watch.acquire(blocking=False):
            try:
                taken = self._watching()
            finally:
                self.watched = False
                self._watch.release()
            if taken:
                return
        self._lock.acquire()

    def _watching(self) -> bool:
        """Whether the lock is the calling thread's now; else there has been nothing to watch for a while."""
        self.watched = True
        seen = runs = quiet = 0
        while True:
            if self._lock.acquire(timeout=LOOK_S):
                return True
            now = self._now
            run = now.run if now else 0
            if now and run and run == seen:
                now.end()
            quiet = quiet + 1 if self.runs == runs and not run else 0
            seen, runs = run, self.runs
            if quiet < QUIET_LOOKS_MAX:
                continue
            self.watched = False
            if not (now and now.run):
                return False
            self.watched = True
