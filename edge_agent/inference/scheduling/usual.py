"""How long things of a kind usually take, from times that others have disturbed now and then.

A time is never too short, but any may be too long: the thread waited for a core, for Python's lock, for a page. So what
is known falls quickly and rises slowly, and stays near the shorter ones of the newest times.

    >>> usual = Usual()
    >>> for seconds in (0.010, 0.100):
    ...     usual.learn("a row", seconds)
    >>> round(usual.of("a row"), 4), usual.of("two rows")
    (0.0105, None)
"""

from collections.abc import Hashable
from typing import Final

FALL: Final = 0.5
RISE: Final = 0.005
"""Weights of the newest time, if it is shorter or longer than what is known."""
KINDS_MAX: Final = 256
"""Kinds that are known at one time; with one more all are learned anew."""


class Usual:
    """See the module. Threads may overwrite what others learn, and what is known stays a time that was near."""

    def __init__(self) -> None:
        self._known: dict[Hashable, float] = {}

    def of(self, kind: Hashable) -> float | None:
        """Seconds; None: nothing is known."""
        return self._known.get(kind)

    def learn(self, kind: Hashable, seconds: float) -> None:
        """Take one time into account."""
        known = self._known.get(kind)
        if known is None:
            if len(self._known) >= KINDS_MAX:
                self._known.clear()
            self._known[kind] = seconds
        else:
            self._known[kind] = known + (FALL if seconds < known else RISE) * (seconds - known)
