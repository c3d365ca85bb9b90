"""How requests are answered once a core is theirs: alone or as one batch, by the new release or by its fallback.

Runs on any thread. What each release did is counted here; who is to blame is decided here and nowhere else: a request
for which the first release fails is asked of the second, and when that fails too the input is to blame and nobody is
judged by it. A batch that fails is taken apart, so that no caller suffers for another one's input.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from common.artifact.tensors import Array
from common.clock import Clock
from common.errors import FerryError
from common.ids import ModelName, Version
from common.monitoring.sketching import Sampled
from common.wire import NotRun
from edge_agent.inference.loaded import Loaded
from edge_agent.inference.requests import Inference, Request
from edge_agent.inference.scheduling import agree, join, split
from edge_agent.inference.trial import Attempt, attempt


class Recorder(Protocol):
    """Where telemetry goes; called on worker threads, so it must be cheap and safe there."""

    def record(self, model: ModelName, version: Version, latency_s: float | None, *, error: bool) -> None:
        """One request: how long the caller waited (None: this release did not answer it), and whether it failed."""
        ...

    def ran(self, model: ModelName, version: Version, rows: int, run_s: float, queue_s: Sequence[float]) -> None:
        """One run of the engine: its rows, its seconds, and how long each of its requests had waited for it."""
        ...

    def not_run(self, model: ModelName, version: Version, why: NotRun) -> None:
        """One request that was never run, and why."""
        ...

    def sampled(self, model: ModelName, version: Version, sample: Sampled) -> None:
        """What is to be counted of one request, for drift."""
        ...


class Answer(NamedTuple):
    """What becomes of a request."""

    request: Request
    outcome: Inference | FerryError


class Answering:
    """Answers requests and counts how they went."""

    def __init__(self, recorder: Recorder, clock: Clock) -> None:
        self._recorder = recorder
        self._clock = clock

    def together(self, requests: Sequence[Request]) -> list[Answer] | None:
        """The answers to requests with one key, run as one batch; None if it failed, and nothing is counted then."""
        loaded = requests[0].chosen.first
        started_at = self._clock.monotonic()
        tried = attempt(loaded, join([request.feeds for request in requests]), requests[0].outputs)
        seconds = self._clock.monotonic() - started_at
        parts = self._parts(requests, tried)
        if parts is None:
            return None
        rows = sum(request.rows or 1 for request in requests)
        loaded.batching.observe(requests[0].shape, rows, seconds)
        loaded.ran(rows, seconds)
        now = self._clock.now()
        waits = [started_at - request.admitted_at for request in requests]
        self._recorder.ran(loaded.model, loaded.version, rows, seconds, waits)
        for queue_s in waits:
            loaded.measure(failed=False, queue_s=queue_s, compute_s=seconds, now=now)
        return [
            self._delivered(loaded, Attempt(outputs=outputs), request, judged=True)
            for request, outputs in zip(requests, parts, strict=True)
        ]

    def try_together(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Find out whether requests that were answered one by one get the same answers as one batch."""
        if not all(isinstance(answer.outcome, Inference) for answer in answers):
            return
        loaded = requests[0].chosen.first
        parts = self._parts(requests, attempt(loaded, join([each.feeds for each in requests]), requests[0].outputs))
        alone = [answer.outcome.outputs for answer in answers if isinstance(answer.outcome, Inference)]
        alike = parts is not None and all(agree(part, other) for part, other in zip(parts, alone, strict=True))
        loaded.batching.tried(alike=alike)

    def alone(self, request: Request) -> Answer:
        """The answer of the first release or, when it fails, of the second."""
        first, second = request.chosen
        tried = self._attempt(first, request)
        if tried.good or second is None:
            return self._delivered(first, tried, request, judged=True)
        other = self._attempt(second, request)
        if not other.good:
            self._recorder.record(second.model, second.version, None, error=True)
            return self._delivered(first, tried, request, judged=False)
        first.count(error=True)
        self._recorder.record(first.model, first.version, None, error=True)
        return self._delivered(second, other, request, judged=True)

    def not_run(self, request: Request, why: NotRun) -> None:
        """The request leaves without having been run."""
        first = request.chosen.first
        self._recorder.not_run(first.model, first.version, why)

    def _parts(self, requests: Sequence[Request], tried: Attempt) -> list[dict[str, Array]] | None:
        rows = [request.rows or 1 for request in requests]
        return split(tried.outputs, rows) if tried.good and tried.outputs is not None else None

    def _attempt(self, loaded: Loaded, request: Request) -> Attempt:
        started_at = self._clock.monotonic()
        tried = attempt(loaded, request.feeds, request.outputs)
        seconds = self._clock.monotonic() - started_at
        if tried.good:
            loaded.ran(request.rows or 1, seconds)
            if loaded is request.chosen.first:
                loaded.batching.observe(request.shape, request.rows or 1, seconds)
        queue_s = started_at - request.admitted_at
        waits = (queue_s,) if loaded is request.chosen.first else ()  # the second had to wait for the first to fail
        self._recorder.ran(loaded.model, loaded.version, request.rows or 1, seconds, waits)
        loaded.measure(failed=not tried.good, queue_s=queue_s, compute_s=seconds, now=self._clock.now())
        return tried

    def _delivered(self, loaded: Loaded, tried: Attempt, request: Request, *, judged: bool) -> Answer:
        """The outcome for the caller, counted."""
        if judged:
            loaded.count(error=not tried.good)
        latency_s = None if tried.failure else self._clock.monotonic() - request.admitted_at
        self._recorder.record(loaded.model, loaded.version, latency_s, error=not tried.good)
        if loaded.watch is not None and tried.outputs is not None:
            sample = loaded.watch.sample(self._clock.monotonic(), request.feeds, tried.outputs)
            if sample is not None:
                self._recorder.sampled(loaded.model, loaded.version, sample)
        return Answer(request, tried.failure or Inference(tried.outputs or {}, loaded.version))
