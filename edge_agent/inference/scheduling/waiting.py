"""Requests that could not run at once: who is next, who goes together, and who is sent away. Pure.

The most urgent ticket runs first, among equals the one that came first. Tickets with the same key may run as one batch;
a batch is filled from all priorities, because a place in it that nobody more urgent can use costs nobody anything.
Where tickets have lengths, only near ones go together, the nearest first; a batch is bounded in bytes too. A ticket
whose deadline has passed is never run. When there is no room, the least urgent makes way: the newcomer, unless somebody
who waits is less urgent than it.
"""

from bisect import insort
from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

from edge_agent.inference.scheduling.padding import near

PRIORITY_MAX: Final = 9
"""The least urgent; 1 is the most urgent. 0 stands for the default, as in Triton's `priority` parameter."""
PRIORITY_DEFAULT: Final = 5


BATCH_BYTES_MAX: Final = 16 * 1024 * 1024


class WaitingFull(Exception):
    """There is no room, and nobody less urgent waits."""


class WaitingLimits(NamedTuple):
    """How much may wait: requests, and the bytes of their inputs. And of one batch: its inputs, in bytes, as they are
    padded; a request that is larger by itself runs alone.
    """

    requests_max: int = 256
    bytes_max: int = 64 * 1024 * 1024
    batch_bytes_max: int = BATCH_BYTES_MAX


class Ticket:
    """One request that waits: `rows` of it in `size` bytes, until `deadline` (monotonic seconds; None: for ever).

    `key` is what requests that may run as one batch have in common; None runs alone. `length` is what they may differ
    in; 0 for those that may not. `work` is the owner's.
    """

    __slots__ = ("deadline", "key", "length", "order", "priority", "rows", "size", "work")

    def __init__(
        self,
        work: Any,
        *,
        key: Hashable | None = None,
        rows: int = 1,
        size: int = 0,
        length: int = 0,
        priority: int = PRIORITY_DEFAULT,
        deadline: float | None = None,
    ) -> None:
        self.work = work
        self.key = key
        self.rows = rows
        self.size = size
        self.length = length
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
        alike = [first] if first.key is None else self._alike(first)
        rows = rows_for(first, sum(ticket.rows for ticket in alike)) if len(alike) > 1 else 0
        batch = self._filled(alike, rows)
        self._leave(batch)
        return Taken(batch, late)

    def _alike(self, first: Ticket) -> list[Ticket]:
        """All that may go with `first`, which is the first of them."""
        alike = [ticket for ticket in self._tickets if ticket.key == first.key and _go_together(first, ticket)]
        if any(ticket.length != first.length for ticket in alike):
            alike.sort(key=lambda ticket: abs(ticket.length - first.length))  # stable: the first stays it
        return alike

    def _filled(self, alike: list[Ticket], rows: int) -> list[Ticket]:
        """The first of `alike` and as many others as have room in a batch of `rows`."""
        batch, left = [alike[0]], rows - alike[0].rows
        longest, per_length = alike[0].length, _bytes_per_length(alike[0])
        for ticket in alike[1:]:
            taller = max(longest, ticket.length)
            wider = per_length + _bytes_per_length(ticket)
            if ticket.rows <= left and wider * max(1, taller) <= self._limits.batch_bytes_max:
                batch.append(ticket)
                left -= ticket.rows
                longest, per_length = taller, wider
        return batch

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


def _go_together(one: Ticket, other: Ticket) -> bool:
    return one.length == other.length or near(one.length, other.length)


def _bytes_per_length(ticket: Ticket) -> float:
    """Bytes that a ticket takes for each step of the length that its batch is padded to, at most."""
    return ticket.size / max(1, ticket.length)


def _order(ticket: Ticket) -> tuple[int, int]:
    return ticket.order
