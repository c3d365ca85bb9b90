"""How requests are answered once a core is theirs: alone or as one batch, by the new release or by its fallback.

Runs on any thread. What each release did is counted here; who is to blame is decided here and nowhere else: a request
for which the first release fails is asked of the second, and when that fails too the input is to blame and nobody is
judged by it. Nor is anybody by what a step of a pipeline calls the caller's fault, unless the second release can answer
it. A batch that fails is taken apart, so that no caller suffers for another one's input.
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
from edge_agent.inference.recall import Recall
from edge_agent.inference.requests import Inference, Request
from edge_agent.inference.scheduling import agree, join, split
from edge_agent.inference.tensors import bytes_of
from edge_agent.inference.trial import Attempt, attempt


class Recorder(Protocol):
    """Where telemetry goes; called on worker threads, so it must be cheap and safe there."""

    def record(self, model: ModelName, version: Version, latency_s: float | None, *, error: bool) -> None:
        """One request: how long the caller waited (None: this release did not answer it), and whether it failed."""
        ...

    def ran(self, model: ModelName, version: Version, rows: int, run_s: float, queue_s: Sequence[float]) -> None:
        """One run of the engine: its rows, its seconds, and how long each of its requests had waited for it."""
        ...

    def answered(
        self, model: ModelName, version: Version, *, rows: int, run_s: float, queue_s: float, latency_s: float
    ) -> None:
        """One request that was run alone and answered well: `ran` and `record` together, because most are."""
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

    def __init__(self, recorder: Recorder, clock: Clock, recall: Recall) -> None:
        self._recorder = recorder
        self.recall = recall
        self._clock = clock

    def together(self, requests: Sequence[Request]) -> list[Answer] | None:
        """The answers to requests with one key, run as one batch; None if it failed, and nothing is counted then."""
        loaded = requests[0].chosen.first
        started_at = self._clock.monotonic()
        longest = _longest(requests)
        tried = attempt(loaded, _joined(loaded, requests, longest), requests[0].outputs)
        seconds = self._clock.monotonic() - started_at
        parts = self._parts(requests, tried)
        if parts is None:
            return None
        if any(request.kind.length != longest for request in requests):
            lengths = loaded.batching.lengths
            parts = [lengths.cut(part, one.kind.length) for part, one in zip(parts, requests, strict=True)]
        rows = sum(request.rows or 1 for request in requests)
        loaded.batching.observe(requests[0].kind, rows, seconds, _bytes(tried))
        loaded.ran(rows, seconds)
        now = self._clock.now()
        waits = [started_at - request.admitted_at for request in requests]
        for request in requests:
            request.compute_s = seconds
        self._recorder.ran(loaded.model, loaded.version, rows, seconds, waits)
        for queue_s in waits:
            loaded.measure(failed=False, queue_s=queue_s, compute_s=seconds, now=now)
        return [
            self._delivered(loaded, Attempt(outputs=outputs), request, judged=True)
            for request, outputs in zip(requests, parts, strict=True)
        ]

    def try_together(self, answers: Sequence[Answer]) -> None:
        """Find out whether requests that were answered one by one (or those of each length by themselves) get the same
        answers as one batch.
        """
        requests = [answer.request for answer in answers]
        alone = [answer.outcome.outputs for answer in answers if isinstance(answer.outcome, Inference)]
        if len(alone) < len(requests):
            return
        loaded, longest = requests[0].chosen.first, _longest(requests)
        parts = self._parts(requests, attempt(loaded, _joined(loaded, requests, longest), requests[0].outputs))
        if any(request.kind.length != longest for request in requests):
            difference = _difference(loaded, requests, parts, alone)
            loaded.batching.lengths.tried(requests[0].outputs, difference)
            if not difference:
                loaded.batching.tried(alike=True)
            return
        alike = parts is not None and all(agree(part, other) for part, other in zip(parts, alone, strict=True))
        loaded.batching.tried(alike=alike)

    def alone(self, request: Request) -> Answer:
        """The answer of the first release or, when it fails, of the second."""
        first, second = request.chosen
        started_at = self._clock.monotonic()
        tried = attempt(first, request.feeds, request.outputs)
        ended_at = self._clock.monotonic()
        request.compute_s = ended_at - started_at
        if tried.failure is None and tried.flaw is None:
            return self._answered(first, tried, request, started_at, ended_at)
        self._measure(first, tried, request, started_at)
        if second is None:
            return self._delivered(first, tried, request, judged=not tried.refused)
        other = self._attempt(second, request)
        if not other.good:
            if not other.refused:
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
        request.compute_s = self._clock.monotonic() - started_at
        self._measure(loaded, tried, request, started_at)
        return tried

    def _measure(self, loaded: Loaded, tried: Attempt, request: Request, started_at: float) -> None:
        """Count how long an attempt took, whatever came of it."""
        rows, seconds, queue_s = request.rows or 1, request.compute_s, started_at - request.admitted_at
        if tried.good:
            loaded.ran(rows, seconds)
        waits = (queue_s,) if loaded is request.chosen.first else ()  # the second had to wait for the first to fail
        self._recorder.ran(loaded.model, loaded.version, rows, seconds, waits)
        loaded.measure(failed=not tried.good, queue_s=queue_s, compute_s=seconds, now=self._clock.now())

    def _answered(self, loaded: Loaded, tried: Attempt, request: Request, started_at: float, ended_at: float) -> Answer:
        """A good answer of the first release, counted in one go: most requests end here."""
        rows, seconds, admitted_at = request.rows or 1, request.compute_s, request.admitted_at
        queue_s = started_at - admitted_at
        if loaded.batching.possible:
            loaded.batching.observe(request.kind, rows, seconds, _bytes(tried))
        loaded.answered(rows, queue_s=queue_s, compute_s=seconds, now=self._clock.now())
        latency_s = ended_at - admitted_at
        self._recorder.answered(
            loaded.model, loaded.version, rows=rows, run_s=seconds, queue_s=queue_s, latency_s=latency_s
        )
        if loaded.watch is not None:
            self._sample(loaded, tried, request)
        return Answer(request, Inference(self._kept(loaded, tried, request), loaded.version, loaded.model))

    def _delivered(self, loaded: Loaded, tried: Attempt, request: Request, *, judged: bool) -> Answer:
        """The outcome for the caller, counted."""
        if judged:
            loaded.count(error=not tried.good)
        latency_s = None if tried.failure else self._clock.monotonic() - request.admitted_at
        if not tried.refused:
            self._recorder.record(loaded.model, loaded.version, latency_s, error=not tried.good)
        self._sample(loaded, tried, request)
        outputs = self._kept(loaded, tried, request)
        return Answer(request, tried.failure or Inference(outputs, loaded.version, loaded.model))

    def _sample(self, loaded: Loaded, tried: Attempt, request: Request) -> None:
        """Take the request into the sketch of what the release sees, if it is its turn."""
        if loaded.watch is not None and tried.outputs is not None:
            sample = loaded.watch.sample(self._clock.monotonic(), request.feeds, tried.outputs)
            if sample is not None:
                self._recorder.sampled(loaded.model, loaded.version, sample)

    def _kept(self, loaded: Loaded, tried: Attempt, request: Request) -> dict[str, Array]:
        """The outputs, which are kept for equal requests to this release if they are good."""
        outputs = tried.outputs or {}
        if request.question is None or not tried.good:
            return outputs
        return self.recall.keep(loaded, request.question, outputs)


def _longest(requests: Sequence[Request]) -> int:
    return max(request.kind.length for request in requests)


def _joined(loaded: Loaded, requests: Sequence[Request], longest: int) -> dict[str, Array]:
    """The inputs of all requests as one batch, as long as the longest of them."""
    padder = loaded.batching.lengths.padder
    if longest and padder:
        return join([padder.padded(request.feeds, longest) for request in requests])
    return join([request.feeds for request in requests])


def _difference(
    loaded: Loaded,
    requests: Sequence[Request],
    parts: Sequence[dict[str, Array]] | None,
    alone: Sequence[dict[str, Array]],
) -> str:
    """How padding changed an answer; empty if it did not."""
    if parts is None:
        return "a batch of padded requests failed, or its outputs have not a row for each of theirs"
    longest, lengths = _longest(requests), loaded.batching.lengths
    differences = (
        lengths.compare(other, part, request.kind.length, longest)
        for request, part, other in zip(requests, parts, alone, strict=True)
    )
    return next(filter(None, differences), "")


def _bytes(tried: Attempt) -> int:
    return bytes_of((tried.outputs or {}).values())
