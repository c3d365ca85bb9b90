"""Requests that could not run at once: who is next, who goes together, and who is sent away. Pure.

The most urgent ticket runs first, among equals the one that came first. Tickets with the same key may run as one batch;
a batch is filled from all priorities, because a place in it that nobody more urgent can use costs nobody anything. A
ticket whose deadline has passed is never run. When there is no room, the least urgent makes way: the newcomer, unless
somebody who waits is less urgent than it.
"""

from bisect import insort
from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

PRIORITY_MAX: Final = 9
"""The least urgent; 1 is the most urgent. 0 stands for the default, as in Triton's `priority` parameter."""
PRIORITY_DEFAULT: Final = 5


class WaitingFull(Exception):
    """There is no room, and nobody less urgent waits."""


class WaitingLimits(NamedTuple):
    """How much may wait: requests, and the bytes of their inputs."""

    requests_max: int = 256
    bytes_max: int = 64 * 1024 * 1024


class Ticket:
    """One request that waits: `rows` of it in `size` bytes, until `deadline` (monotonic seconds; None: for ever).

    `key` is what requests that may run as one batch have in common; None runs alone. `work` is the owner's.
    """

    __slots__ = ("deadline", "key", "order", "priority", "rows", "size", "work")

    def __init__(
        self,
        work: Any,
        *,
        key: Hashable | None = None,
        rows: int = 1,
        size: int = 0,
        priority: int = PRIORITY_DEFAULT,
        deadline: float | None = None,
    ) -> None:
        self.work = work
        self.key = key
        self.rows = rows
        self.size = size
        self.priority = priority or PRIORITY_DEFAULT
        self.deadline = deadline
        self.order = (self.priority, 0)


class Taken(NamedTuple):
    """What to do now: tickets to run together (none if nothing waits), and those that are too late for it."""

    batch: list[Ticket]
    late: list[Ticket]


class Waiting:
    """Tickets in the order in which they run. Not safe for threads."""

    def __init__(self, limits: WaitingLimits) -> None:
        self._limits = limits
        self._tickets: list[Ticket] = []
        self._count = 0
        self._bytes = 0
        self._timed = 0

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def rows(self) -> int:
        """Rows of all that wait."""
        return sum(ticket.rows for ticket in self._tickets)

    def add(self, ticket: Ticket, free: int = 0) -> list[Ticket]:
        """Let `ticket` wait; returns those that make way for it. Raises `WaitingFull`, and nothing is changed.

        `free` tickets will be taken at once, so they need no room.
        """
        requests_max = self._limits.requests_max + free
        shed: list[Ticket] = []
        requests, size = len(self._tickets) + 1, self._bytes + ticket.size
        for other in reversed(self._tickets):
            if requests <= requests_max and size <= self._limits.bytes_max:
                break
            if other.priority <= ticket.priority:
                raise WaitingFull
            shed.append(other)
            requests, size = requests - 1, size - other.size
        if requests > requests_max or (size > self._limits.bytes_max and requests > free):
            raise WaitingFull
        for other in shed:
            self.remove(other)
        self._count += 1
        ticket.order = (ticket.priority, self._count)
        insort(self._tickets, ticket, key=_order)
        self._bytes += ticket.size
        self._timed += ticket.deadline is not None
        return shed

    def take(self, now: float, rows_for: Callable[[Ticket, int], int]) -> Taken:
        """The next batch at `now` (monotonic seconds), which leaves the queue.

        `rows_for(first, waiting)` says how many of the `waiting` rows that may go with `first` to run together; a
        ticket is not divided, and the first one is always taken.
        """
        late = self._late(now) if self._timed else []
        if not self._tickets:
            return Taken([], late)
        first = self._tickets[0]
        alike = [first] if first.key is None else [ticket for ticket in self._tickets if ticket.key == first.key]
        batch, left = [first], 0
        if len(alike) > 1:
            left = rows_for(first, sum(ticket.rows for ticket in alike)) - first.rows
        for ticket in alike[1:]:
            if ticket.rows <= left:
                batch.append(ticket)
                left -= ticket.rows
        self._leave(batch)
        return Taken(batch, late)

    def remove(self, ticket: Ticket) -> bool:
        """Take `ticket` out, because nobody waits for its answer any more; whether it was still here."""
        if ticket not in self._tickets:
            return False
        self._leave([ticket])
        return True

    def clear(self) -> list[Ticket]:
        """Everything that waits, which leaves the queue."""
        tickets = list(self._tickets)
        self._leave(tickets)
        return tickets

    def _late(self, now: float) -> list[Ticket]:
        late = [ticket for ticket in self._tickets if ticket.deadline is not None and ticket.deadline <= now]
        if late:
            self._leave(late)
        return late

    def _leave(self, leaving: list[Ticket]) -> None:
        if leaving == self._tickets[: len(leaving)]:
            del self._tickets[: len(leaving)]
        else:
            gone = set(map(id, leaving))
            self._tickets = [ticket for ticket in self._tickets if id(ticket) not in gone]
        for ticket in leaving:
            self._bytes -= ticket.size
            self._timed -= ticket.deadline is not None


def _order(ticket: Ticket) -> tuple[int, int]:
    return ticket.order
