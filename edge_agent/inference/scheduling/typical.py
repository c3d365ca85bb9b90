"""How long something usually takes, from times that others have disturbed now and then.

A time is never too short, but any may be too long: the thread waited for a core, for Python's lock, for a page. So what
is known falls quickly and rises slowly, and stays near the shorter ones of the newest times.

    >>> round(typical(0.010, 0.100), 4), round(typical(0.010, 0.002), 4)
    (0.0105, 0.006)
"""

from typing import Final

FALL: Final = 0.5
RISE: Final = 0.005
"""Weights of the newest time, if it is shorter or longer than what is known."""


def typical(known_s: float | None, newest_s: float) -> float:
    """What is known after `newest_s`; None: nothing was."""
    if known_s is None:
        return newest_s
    return known_s + (FALL if newest_s < known_s else RISE) * (newest_s - known_s)
