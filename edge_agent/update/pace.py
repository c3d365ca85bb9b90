"""When a busy device loads a new release: at once, or later, but never later than a maximum.

Samples of CPU load and of the mean latency of answers come every second or two; every few seconds `judged` takes those
that came since as one. A device becomes busy when either mean reaches its limit, and is free again only when both are
below a share of it, so that a load around the limit does not flip it. `may_load` says whether a load that waits since
some moment may go on: when the device is not busy, or when it has waited for `defer_s_max`.

    >>> busy = judged(Pace(), [Sample(cpu_percent=97.0, latency_s=None)], PaceLimits())
    >>> busy.busy, judged(busy, [Sample(cpu_percent=80.0, latency_s=None)], PaceLimits()).busy
    (True, True)
    >>> may_load(busy, waited_s=5.0, limits=PaceLimits()), may_load(busy, waited_s=60.0, limits=PaceLimits())
    (False, True)
"""

from collections.abc import Sequence
from typing import Final

import msgspec

SAMPLE_S: Final = 1.5
DECIDE_S: Final = 3.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's CPU load (0 to 100) since the sample before, and the mean latency of answers since then; None when
    there was none.
    """

    cpu_percent: float
    latency_s: float | None


class PaceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """When a device is busy, and how long that may hold up a load."""

    cpu_percent_max: float = 85.0
    latency_s_max: float = 0.5
    free_share: float = 0.9
    """Busy ends below this share of both limits."""
    defer_s_max: float = 60.0
    """0: nothing is ever deferred."""


class Pace(msgspec.Struct, frozen=True):
    """What was decided last, and why, in words for the report."""

    busy: bool = False
    reason: str = ""


def judged(pace: Pace, samples: Sequence[Sample], limits: PaceLimits) -> Pace:
    """The decision after `pace` on what came since. Without samples it stays as it is."""
    if not samples:
        return pace
    share = limits.free_share if pace.busy else 1.0
    cpu = sum(sample.cpu_percent for sample in samples) / len(samples)
    latencies = [sample.latency_s for sample in samples if sample.latency_s is not None]
    latency = sum(latencies) / len(latencies) if latencies else 0.0
    if cpu >= share * limits.cpu_percent_max:
        return Pace(True, f"the CPU is {cpu:.0f} % busy")
    if latency >= share * limits.latency_s_max:
        return Pace(True, f"answers take {latency:.2g} s")
    return Pace()


def may_load(pace: Pace, *, waited_s: float, limits: PaceLimits) -> bool:
    """Whether a load that has waited for so long may begin."""
    return not pace.busy or waited_s >= limits.defer_s_max
