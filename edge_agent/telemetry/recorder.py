"""Counts of what each release did, cut into windows.

Every inference passes through here, so recording is a bisection or three and a few additions under one lock (about
1 us); the percentiles are somebody else's job. `cut` ends the present windows and begins new ones;
a release that did nothing has no window.
"""

import threading
from bisect import bisect_left
from collections.abc import Sequence

from common.ids import ModelName, Version
from common.monitoring.sketching import Sampled, sketch_of
from common.wire import LATENCY_BOUNDS_S, RUN_ROWS_BOUNDS, NotRun, TelemetryWindow

SAMPLES_MAX = 256
"""Requests of one window of which elements are kept to be counted for drift."""


class _Counts:
    """One window of one release, while it is open."""

    __slots__ = (
        "cancelled", "correct", "errors", "expired", "labelled", "latencies", "queue_max_s", "queue_sum_s", "queued",
        "refused", "requests", "rows", "run_s", "runs", "samples", "sum_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = self.errors = self.rows = 0
        self.refused = self.expired = self.cancelled = self.labelled = self.correct = 0
        self.samples: list[Sampled] = []
        self.latencies = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.queued = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.runs = [0] * (len(RUN_ROWS_BOUNDS) + 1)
        self.sum_s = self.queue_sum_s = self.queue_max_s = self.run_s = 0.0


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
            counts = self._counts(model, version)
            counts.requests += 1
            counts.errors += error
            if latency_s is not None:
                counts.latencies[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
                counts.sum_s += latency_s

    def ran(self, model: ModelName, version: Version, rows: int, run_s: float, queue_s: Sequence[float]) -> None:
        """The engine took `run_s` for `rows` rows at one time; `queue_s` is how long each of their requests waited."""
        with self._lock:
            counts = self._counts(model, version)
            counts.runs[bisect_left(RUN_ROWS_BOUNDS, rows)] += 1
            counts.rows += rows
            counts.run_s += run_s
            for waited_s in queue_s:
                counts.queued[bisect_left(LATENCY_BOUNDS_S, waited_s)] += 1
                counts.queue_sum_s += waited_s
                counts.queue_max_s = max(counts.queue_max_s, waited_s)

    def answered(
        self, model: ModelName, version: Version, *, rows: int, run_s: float, queue_s: float, latency_s: float
    ) -> None:
        """One request that was run alone and answered well: `ran` and `record` together."""
        bucket = bisect_left(LATENCY_BOUNDS_S, latency_s), bisect_left(LATENCY_BOUNDS_S, queue_s)
        with self._lock:
            counts = self._counts(model, version)
            counts.requests += 1
            counts.latencies[bucket[0]] += 1
            counts.sum_s += latency_s
            counts.runs[bisect_left(RUN_ROWS_BOUNDS, rows)] += 1
            counts.rows += rows
            counts.run_s += run_s
            counts.queued[bucket[1]] += 1
            counts.queue_sum_s += queue_s
            counts.queue_max_s = max(counts.queue_max_s, queue_s)

    def not_run(self, model: ModelName, version: Version, why: NotRun) -> None:
        """One request that was never run."""
        with self._lock:
            counts = self._counts(model, version)
            setattr(counts, why, getattr(counts, why) + 1)

    def labelled(self, model: ModelName, version: Version, count: int, correct: int) -> None:
        """`count` rows of answers of this release were labelled."""
        with self._lock:
            counts = self._counts(model, version)
            counts.labelled += count
            counts.correct += correct

    def sampled(self, model: ModelName, version: Version, sample: Sampled) -> None:
        """What is to be counted of one request when the window ends; beyond `SAMPLES_MAX` it is passed over."""
        with self._lock:
            samples = self._counts(model, version).samples
            if len(samples) < SAMPLES_MAX:
                samples.append(sample)

    def cut(self, now: float) -> list[TelemetryWindow]:
        """End the windows at `now` (seconds since the epoch), ordered by model and version."""
        with self._lock:
            finished, self._open = self._open, {}
            started_at, self._started_at = self._started_at, now
        return [
            _window(model, version, started_at, now, counts) for (model, version), counts in sorted(finished.items())
        ]

    def _counts(self, model: ModelName, version: Version) -> _Counts:
        counts = self._open.get((model, version))
        if counts is None:
            counts = self._open[model, version] = _Counts()
        return counts


def _window(model: ModelName, version: Version, started_at: float, ended_at: float, counts: _Counts) -> TelemetryWindow:
    return TelemetryWindow(
        model=model,
        version=version,
        started_at=started_at,
        ended_at=ended_at,
        requests=counts.requests,
        errors=counts.errors,
        latency_counts=tuple(counts.latencies),
        latency_sum_s=counts.sum_s,
        queue_counts=tuple(counts.queued) if any(counts.queued) else None,
        queue_sum_s=counts.queue_sum_s,
        queue_max_s=counts.queue_max_s,
        run_counts=tuple(counts.runs) if any(counts.runs) else None,
        run_rows=counts.rows,
        run_sum_s=counts.run_s,
        refused=counts.refused,
        expired=counts.expired,
        cancelled=counts.cancelled,
        labelled=counts.labelled,
        correct=counts.correct,
        sketch=sketch_of(_alike(counts.samples)),
    )


def _alike(samples: list[Sampled]) -> list[Sampled]:
    """Those by the newest reference: a release that was published anew elsewhere may have come with another one."""
    return [sample for sample in samples if sample.digest == samples[-1].digest]
