"""Holds a load back while the device is busy: takes the samples, lets `edge_agent.update.pace` decide.

Samples are taken only while something waits, so a device without updates pays nothing. A device that serves nothing yet
waits for nothing.
"""

import asyncio
from collections.abc import Callable

from common.clock import Clock
from edge_agent.inference.serving import ModelServer
from edge_agent.update.pace import DECIDE_S, SAMPLE_S, Pace, PaceLimits, Sample, judged, may_load

DECIDE_EVERY = round(DECIDE_S / SAMPLE_S)
"""Samples that make a decision."""


class Pacing:
    """`cpu_percent` gives the machine's CPU load since it was last called."""

    def __init__(
        self,
        server: ModelServer,
        cpu_percent: Callable[[], float],
        clock: Clock,
        limits: PaceLimits,
        *,
        sample_s: float = SAMPLE_S,
    ) -> None:
        self._server = server
        self._cpu_percent = cpu_percent
        self._clock = clock
        self._limits = limits
        self._sample_s = sample_s

    async def clear(self, tell: Callable[[str], None]) -> None:
        """Return when a load may begin; meanwhile `tell` gets what it waits for, and at the end an empty string."""
        if not self._limits.defer_s_max or not self._server.in_memory():
            return
        began, pace = self._clock.monotonic(), Pace()
        try:
            while True:
                pace = judged(pace, await self._samples(), self._limits)
                if may_load(pace, waited_s=self._clock.monotonic() - began, limits=self._limits):
                    return
                tell(f"loading waits for a quieter moment: {pace.reason}")
        finally:
            tell("")

    async def _samples(self) -> list[Sample]:
        self._cpu_percent()  # sets the mark
        answered, seconds = self._server.answered()
        samples: list[Sample] = []
        for _ in range(DECIDE_EVERY):
            await asyncio.sleep(self._sample_s)
            count, total = self._server.answered()
            latency_s = (total - seconds) / (count - answered) if count > answered else None
            samples.append(Sample(cpu_percent=self._cpu_percent(), latency_s=latency_s))
            answered, seconds = count, total
        return samples
