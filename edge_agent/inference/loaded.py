"""One release in memory: its session, how many requests stand on it, and how they went.

A request pins the release before it starts and unpins it when it is done, so a session is closed exactly when it has
been retired and its last request has left. Counts and pins change on worker threads, under one lock.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import msgspec

from common.artifact import TensorSpec
from common.artifact.serving import ServingTerms
from common.artifact.tensors import Array, Expected
from common.ids import ModelName, Version
from edge_agent.inference.batching import Batching
from edge_agent.inference.health import Health
from edge_agent.inference.opening import Opened
from edge_agent.inference.scheduling import Usual
from edge_agent.inference.watch import Watch

RUN_ROWS_MAX = 64
"""Runs with more rows are counted together."""


class Runs(msgspec.Struct, frozen=True):
    """How often the engine ran `rows` rows at one time, and for how many seconds in all."""

    rows: int
    count: int
    seconds: float


class Statistics(msgspec.Struct, frozen=True):
    """What `/stats` tells of a release: counts since it was loaded, durations in seconds, times since the epoch.

    `queue_s` is time spent waiting for a free core, `compute_s` time inside the engine; both of answered requests.
    `hits` were answered from memory and are not among `answered`, `misses` were looked up there and are.
    """

    answered: int
    failed: int
    answered_s: float
    failed_s: float
    queue_s: float
    compute_s: float
    last_at: float
    hits: int = 0
    hit_s: float = 0.0
    misses: int = 0
    miss_s: float = 0.0
    runs: tuple["Runs", ...] = ()


class Loaded:
    """A release that can answer. `inputs` and `outputs` are the manifest's, `serving` with the owner's changes."""

    def __init__(
        self,
        model: ModelName,
        version: Version,
        opened: Opened,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        serving: ServingTerms = ServingTerms(),  # noqa: B008 (frozen: sharing the default is safe)
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.model = model
        self.version = version
        self.inputs = inputs
        self.outputs = outputs
        self.example = opened.example
        self.serving = serving
        self.batching = Batching(inputs, outputs, serving.padding, row_wise=opened.row_wise)
        self.expected = Expected(inputs)
        self.output_names = tuple(spec.name for spec in outputs)
        self.interface = _names_and_types(inputs), _names_and_types(outputs)
        self._session = opened.session
        self._lock = threading.Lock()
        self._pins = 0
        self._retired = False
        self._closed: Future[None] = Future()
        self._requests = self._errors = self._consecutive = 0
        self._runs: dict[int, tuple[int, float]] = {}
        self._answered = self._failed = self._hits = self._misses = 0
        self._answered_s = self._failed_s = self._queue_s = self._compute_s = self._last_at = 0.0
        self._hit_s = self._miss_s = 0.0
        self._asked_at = 0.0
        self.usual = Usual()
        """How long it takes to run and answer requests of a kind, by their number of rows."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """The session's answer; the caller holds a pin."""
        return self._session.run(feeds, outputs)

    def stop(self, thread: int) -> None:
        """See `Session.stop`."""
        self._session.stop(thread)

    def pin(self) -> bool:
        """Keep the session open for one request; False if it has been retired."""
        with self._lock:
            if self._retired:
                return False
            self._pins += 1
            return True

    def unpin(self) -> None:
        """The request is done; the last one to leave a retired release closes it."""
        with self._lock:
            self._pins -= 1
            close = self._retired and self._pins == 0
        if close:
            self._close()

    def retire(self) -> "Future[None]":
        """Close the session as soon as nobody stands on it. The future is done when that has happened."""
        with self._lock:
            close = not self._retired and self._pins == 0
            self._retired = True
        if close:
            self._close()
        return self._closed

    def answered(self, rows: int, *, queue_s: float, compute_s: float, now: float) -> None:
        """One request was run alone and answered well: `count`, `measure` and `ran` together."""
        size = min(rows, RUN_ROWS_MAX)
        with self._lock:
            self._requests += 1
            self._consecutive = 0
            self._last_at = self._asked_at = now
            self._answered += 1
            self._answered_s += queue_s + compute_s
            self._queue_s += queue_s
            self._compute_s += compute_s
            self._ran(size, compute_s)

    def count(self, *, error: bool) -> None:
        """Take one request into the release's health."""
        with self._lock:
            self._requests += 1
            self._errors += error
            self._consecutive = self._consecutive + 1 if error else 0

    def measure(self, *, failed: bool, queue_s: float, compute_s: float, now: float) -> None:
        """Take one request into the release's statistics; durations in seconds, `now` since the epoch."""
        with self._lock:
            self._last_at = self._asked_at = now
            if failed:
                self._failed += 1
                self._failed_s += queue_s + compute_s
                return
            self._answered += 1
            self._answered_s += queue_s + compute_s
            self._queue_s += queue_s
            self._compute_s += compute_s

    @property
    def asked_at(self) -> float:
        """When it was last asked something, from memory or not, in seconds since the epoch; 0 if it never was."""
        with self._lock:
            return self._asked_at

    def looked_up(self, *, hit: bool, seconds: float, now: float) -> None:
        """Take one look for an answer that was given before into the release's statistics."""
        with self._lock:
            self._asked_at = now
            if hit:
                self._hits += 1
                self._hit_s += seconds
            else:
                self._misses += 1
                self._miss_s += seconds

    def ran(self, rows: int, seconds: float) -> None:
        """The engine ran `rows` rows at one time."""
        size = min(rows, RUN_ROWS_MAX)
        with self._lock:
            self._ran(size, seconds)

    def _ran(self, size: int, seconds: float) -> None:
        count, total = self._runs.get(size, (0, 0.0))
        self._runs[size] = count + 1, total + seconds

    def health(self) -> Health:
        """How requests have gone since the release was loaded."""
        with self._lock:
            return Health(self._requests, self._errors, self._consecutive)

    def statistics(self) -> Statistics:
        """The counts for `/stats`."""
        with self._lock:
            return Statistics(
                answered=self._answered,
                failed=self._failed,
                answered_s=self._answered_s,
                failed_s=self._failed_s,
                queue_s=self._queue_s,
                compute_s=self._compute_s,
                last_at=self._last_at,
                hits=self._hits,
                hit_s=self._hit_s,
                misses=self._misses,
                miss_s=self._miss_s,
                runs=tuple(Runs(rows, *totals) for rows, totals in sorted(self._runs.items())),
            )

    def _close(self) -> None:
        # Freeing a session holds the GIL for some ms: not on the event loop, not on a thread that owes an answer.
        def close() -> None:
            try:
                self._session.close()
            finally:
                self._closed.set_result(None)

        threading.Thread(target=close, name=f"close-{self.model}@{self.version}", daemon=True).start()


def _names_and_types(specs: tuple[TensorSpec, ...]) -> frozenset[tuple[str, str]]:
    return frozenset((spec.name, spec.datatype) for spec in specs)
