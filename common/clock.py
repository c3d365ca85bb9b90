"""The only reader of time in the programs. Pure code takes `now` as an argument instead.

`now` is wall time in seconds since the Unix epoch, UTC: it may jump. `monotonic` never goes back and is for
durations and deadlines; its zero means nothing.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Where a program gets its time from."""

    def now(self) -> float:
        """Wall time in seconds since 1970-01-01T00:00:00Z."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
