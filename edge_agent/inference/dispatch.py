"""The threads that run requests: one for each core, fed from one bounded queue; and callers who run their own.

A caller's own thread may take a free core (`try_begin`) when nothing waits: then nobody hands anything over. All others
wait in `Waiting` and are taken in batches. What a batch is, and what is done with it, is the owner's (`Owner`); nothing
here knows about models.
"""

import threading
from collections.abc import Sequence
from typing import Protocol

from common.clock import Clock
from edge_agent.inference.scheduling import Ticket, Waiting, WaitingFull, WaitingLimits


class Owner(Protocol):
    """Whose tickets these are; called on the dispatcher's threads, `rows_for` under its lock."""

    def rows_for(self, first: Ticket, waiting: int) -> int:
        """How many of `waiting` rows like those of `first` to run together."""
        ...

    def run(self, batch: Sequence[Ticket]) -> None:
        """Run and answer; must not raise."""
        ...

    def refuse(self, ticket: Ticket, *, late: bool) -> None:
        """Tell that `ticket` will not run: its deadline has passed, or there is no room."""
        ...


class Dispatcher:
    """`cores` requests or batches at one time. The methods may be called from any thread."""

    def __init__(self, cores: int, limits: WaitingLimits, owner: Owner, clock: Clock) -> None:
        self._owner = owner
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting = Waiting(limits)
        self._cores = cores
        self._free = cores
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"inference-{number}", daemon=True) for number in range(cores)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def try_begin(self) -> bool:
        """Take a core for the calling thread, if one is free and nobody waits; `end` gives it back."""
        with self._changed:
            if self._free == 0 or len(self._waiting) or self._closed:
                return False
            self._free -= 1
            return True

    def end(self) -> None:
        """Give back what `try_begin` took."""
        with self._changed:
            self._free += 1
            if len(self._waiting):
                self._changed.notify()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Let `tickets` wait for a core; those for which there is no room are refused, or less urgent ones are."""
        refused: list[Ticket] = []
        with self._changed:
            for ticket in tickets:
                try:
                    refused += self._waiting.add(ticket, self._free)
                except WaitingFull:
                    refused.append(ticket)
            self._changed.notify(min(self._free, len(self._waiting)))
        for ticket in refused:
            self._owner.refuse(ticket, late=False)

    def cancel(self, ticket: Ticket) -> bool:
        """Nobody waits for `ticket` any more: whether it will not run because of that."""
        with self._changed:
            return self._waiting.remove(ticket)

    def close(self) -> None:
        """Run what waits, then end the threads. Returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (tickets := self._next()) is not None:
            batch, late = tickets
            for ticket in late:
                self._owner.refuse(ticket, late=True)
            try:
                if batch:
                    self._owner.run(batch)
            finally:
                with self._changed:
                    self._free += 1

    def _next(self) -> tuple[list[Ticket], list[Ticket]] | None:
        """What to do next, with a core for it; None when there is nothing more to do."""
        with self._changed:
            while not (len(self._waiting) and self._free):
                if self._closed and not len(self._waiting):
                    return None
                self._changed.wait()
            free = self._free
            self._free -= 1
            return self._waiting.take(
                self._clock.monotonic(), lambda first, rows: self._owner.rows_for(first, -(-rows // free))
            )
