"""Counts of what each release did, cut into windows.

Every inference passes through here, so recording is a bisection and a few additions under one lock (about 0.5 us); the
percentiles are somebody else's job. `cut` ends the present windows and begins new ones; a release that did nothing has
no window.
"""

import threading
from bisect import bisect_left

from common.ids import ModelName, Version
from common.wire import LATENCY_BOUNDS_S, TelemetryWindow


class _Counts:
    """One window of one release, while it is open."""

    __slots__ = ("errors", "latencies", "requests", "sum_s")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.latencies = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.sum_s = 0.0


class Recorder:
    """Thread-safe counters per (model, version). `started_at` is wall time in seconds since the epoch."""

    def __init__(self, started_at: float) -> None:
        self._lock = threading.Lock()
        self._started_at = started_at
        self._open: dict[tuple[ModelName, Version], _Counts] = {}

    def record(self, model: ModelName, version: Version, latency_s: float | None, *, error: bool) -> None:
        """One request to a release.

        `latency_s` is how long the caller waited, or None when this release did not answer. A bucket holds the
        latencies up to and including its bound, as in Prometheus.
        """
        with self._lock:
            counts = self._open.get((model, version))
            if counts is None:
                counts = self._open[model, version] = _Counts()
            counts.requests += 1
            counts.errors += error
            if latency_s is not None:
                counts.latencies[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
                counts.sum_s += latency_s

    def cut(self, now: float) -> list[TelemetryWindow]:
        """End the windows at `now` (seconds since the epoch), ordered by model and version."""
        with self._lock:
            finished, self._open = self._open, {}
            started_at, self._started_at = self._started_at, now
        return [
            TelemetryWindow(
                model=model,
                version=version,
                started_at=started_at,
                ended_at=now,
                requests=counts.requests,
                errors=counts.errors,
                latency_counts=tuple(counts.latencies),
                latency_sum_s=counts.sum_s,
            )
            for (model, version), counts in sorted(finished.items())
        ]
