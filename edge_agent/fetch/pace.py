"""Downloading no faster than a set rate, so that a metered or shared link stays usable.

One `Pace` is shared by all downloads of a device: the rate is the device's, not one download's.
"""

import asyncio

from common.clock import Clock

BURST_S = 0.25
"""A slow link is filled in portions of about this long."""


class Pace:
    """Spends bytes over time; 0 bytes a second means no limit."""

    def __init__(self, rate_bytes_per_s: int, clock: Clock) -> None:
        self._rate = rate_bytes_per_s
        self._clock = clock
        self._free_at = 0.0

    def portion(self, most: int) -> int:
        """How many bytes to move at once: `most`, or less where the rate is low."""
        return most if not self._rate else max(1, min(most, int(self._rate * BURST_S)))

    async def spend(self, count: int) -> None:
        """Return when `count` more bytes have had their time."""
        if not self._rate:
            return
        now = self._clock.monotonic()
        self._free_at = max(self._free_at, now) + count / self._rate
        await asyncio.sleep(self._free_at - now)
