"""The models that a device serves, and how one release takes over from another without a request being lost.

A release goes prepare -> switch -> commit, or back:

- `prepare` loads and warms it beside the running one, on a throw-away thread of the lowest priority.
- `switch` replaces one reference. The previous release stays in memory as the fallback: a request for which the new
  release raises or gives a NaN or an infinity is answered by the previous one, and counted against the new one. When
  the previous release fails on the same request too, the input is to blame and nobody is judged by it.
- `commit` lets the fallback go, `revert` puts it back. A request finishes on the sessions it started with; a session
  is closed when its last request has left.

A request that names a version is answered by that version or by an error, never by another one. A fallback whose
inputs or outputs have other names or types than the new release's stands by for `revert` only.

All methods are called on one event loop; inference runs on as many threads as there are cores, behind a bounded queue.
The server does not judge: `edge_agent.inference.health` does, and whoever runs the update acts on it.
"""

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from common.artifact import TensorSpec
from common.clock import Clock
from common.errors import Conflict, NotFound, Unavailable
from common.ids import ModelName, Version
from edge_agent.inference.engine import Array, Engine, EngineFailure, Session
from edge_agent.inference.health import Health
from edge_agent.inference.loaded import Loaded, Statistics
from edge_agent.inference.niced import run_niced
from edge_agent.inference.tensors import check_feeds, check_outputs
from edge_agent.inference.trial import Attempt, ModelRejected, attempt, check, probe

QUEUE_REQUESTS_MAX = 64
"""Requests that may wait for a core; one more is refused at once."""


class Overloaded(Unavailable):
    """Every core is busy and the queue is full; the request was not started."""

    code = "overloaded"


class Recorder(Protocol):
    """Where telemetry goes; called on worker threads, so it must be cheap and safe there."""

    def record(self, model: ModelName, version: Version, latency_s: float | None, *, error: bool) -> None:
        """One request: how long the caller waited (None: this release did not answer it), and whether it failed."""
        ...


class Inference(NamedTuple):
    """An answer, and the release that gave it."""

    outputs: dict[str, Array]
    version: Version


class Candidate(NamedTuple):
    """A release that is loaded, checked and warm, and does not serve yet."""

    model: ModelName
    version: Version
    loaded: Loaded


class Served(msgspec.Struct, frozen=True):
    """A release that can answer requests now.

    `current` is the one that answers requests without a version; the other is its fallback, while `probation` lasts.
    """

    model: ModelName
    version: Version
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    current: bool
    probation: bool
    statistics: Statistics


class _Placement(NamedTuple):
    """Who answers for a model: replaced as a whole, never changed."""

    current: Loaded
    fallback: Loaded | None
    probation: bool

    @property
    def stand_in(self) -> Loaded | None:
        """The fallback, if it can answer the same requests."""
        return self.fallback if self.fallback and self.fallback.interface == self.current.interface else None


class _Request(NamedTuple):
    """What a worker needs to answer. It holds a pin on `first` and on `second`."""

    first: Loaded
    second: Loaded | None
    feeds: Mapping[str, Array]
    outputs: Sequence[str]
    admitted_at: float


class ModelServer:
    """Serves models by name; see the module's text for the life of a release.

    `workers` is the number of inferences at one time (default: the cores that this process may use), `queue` how many
    more may wait.
    """

    def __init__(
        self,
        engine: Engine,
        recorder: Recorder,
        clock: Clock,
        *,
        workers: int | None = None,
        queue: int = QUEUE_REQUESTS_MAX,
    ) -> None:
        self._engine = engine
        self._recorder = recorder
        self._clock = clock
        workers = workers or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="inference")
        self._room = threading.BoundedSemaphore(workers + queue)
        self._placements: dict[ModelName, _Placement] = {}
        self._loading = asyncio.Lock()
        self._closed = False
        self._finished = 0

    @property
    def finished(self) -> int:
        """A number that changes whenever a request has left its thread, however it went."""
        return self._finished

    async def pulse(self) -> None:
        """Return when an inference thread has had a moment for us: behind the requests that wait, before later ones."""
        await asyncio.wrap_future(self._pool.submit(int))

    @property
    def platform(self) -> str:
        """The engine's name in model metadata."""
        return self._engine.platform

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed

    async def infer(
        self,
        model: ModelName,
        version: Version | None,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
    ) -> Inference:
        """The model's answer to `feeds` (input name to array of the declared type and shape).

        Without `version` the release in service answers, and during probation the previous one in its place if need
        be. `outputs` picks some outputs by name; None means all.

        Raises `NotFound` (model or version is not served), `InvalidInput` (names the tensor and what is expected),
        `Overloaded` (nothing was started), `EngineFailure` (the model raised).
        """
        admitted_at = self._clock.monotonic()
        first, second = self._choose(model, version)
        check_feeds(first.inputs, feeds)
        if outputs is None:
            outputs = [spec.name for spec in first.outputs]
        else:
            check_outputs(first.outputs, outputs)
        return await asyncio.wrap_future(self._submit(_Request(first, second, feeds, outputs, admitted_at)))

    async def prepare(
        self,
        model: ModelName,
        version: Version,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> Candidate:
        """Load the model file at `path`, check it against the manifest's `inputs` and `outputs`, and warm it up.

        One load at a time, at the lowest priority. Raises `ModelRejected` when the release is at fault; `NotFound` (no
        file) and `Unavailable` (no memory) say nothing about it.
        """

        def load() -> Session:
            session = self._engine.load(path)
            try:
                check(session, inputs, outputs)
            except BaseException:
                session.close()
                raise
            return session

        async with self._loading:
            try:
                session = await run_niced(load, f"load-{model}@{version}")
            except EngineFailure as error:
                raise ModelRejected(error.message) from error
        return Candidate(model, version, Loaded(model, version, session, inputs, outputs))

    def switch(self, candidate: Candidate) -> None:
        """Let the candidate answer from the next request on; what ran before becomes its fallback.

        Raises `Conflict` while an earlier switch of the model is neither committed nor reverted.
        """
        before = self._placements.get(candidate.model)
        if before and before.probation:
            running = f"{candidate.model}@{before.current.version} is in probation"
            raise Conflict(running, fix="commit or revert it first")
        fallback = before.current if before else None
        self._placements[candidate.model] = _Placement(candidate.loaded, fallback, probation=True)

    def health(self, model: ModelName) -> Health:
        """How requests to the release in service have gone since it was switched to."""
        return self._placement(model).current.health()

    async def self_probe(self, model: ModelName, count: int) -> Health:
        """Run `count` synthetic requests on the release in service, at the lowest priority, and say how they went.

        They are neither in `health` nor in the telemetry: for probation on a device that nobody calls.
        """
        loaded = self._placement(model).current
        loaded.pin()

        def work() -> Health:
            try:
                return probe(loaded, loaded.inputs, loaded.outputs, count)
            finally:
                loaded.unpin()

        return await run_niced(work, f"probe-{model}@{loaded.version}")

    async def commit(self, model: ModelName) -> None:
        """End the probation well: let the fallback go, and return when its last request has left and it is closed.

        Without a probation there is nothing to do.
        """
        current, fallback, _ = self._placement(model)
        self._placements[model] = _Placement(current, None, probation=False)
        await _retired(fallback)

    async def revert(self, model: ModelName) -> None:
        """Undo the switch: the fallback serves again (without one the model is out of service).

        Returns when the new release's last request has left and it is closed. Raises `Conflict` outside probation.
        """
        current, fallback, probation = self._placement(model)
        if not probation:
            raise Conflict(f"{model}@{current.version} is committed", fix="switch to the release you want instead")
        if fallback:
            self._placements[model] = _Placement(fallback, None, probation=False)
        else:
            del self._placements[model]
        await _retired(current)

    async def retire(self, model: ModelName) -> None:
        """Take the model out of service; requests that are under way are still answered. Unknown models are ignored."""
        placement = self._placements.pop(model, None)
        if placement:
            await asyncio.gather(_retired(placement.current), _retired(placement.fallback))

    async def discard(self, candidate: Candidate) -> None:
        """Close a candidate that will not be switched to."""
        await _retired(candidate.loaded)

    async def close(self) -> None:
        """Refuse new requests, answer those that are under way, close everything."""
        self._closed = True
        await asyncio.gather(*(self.retire(model) for model in list(self._placements)))
        self._pool.shutdown(wait=False)

    def models(self) -> tuple[Served, ...]:
        """Every release that can answer, by model name, the current one first."""
        return tuple(
            _served(loaded, placement)
            for _, placement in sorted(self._placements.items())
            for loaded in (placement.current, placement.fallback)
            if loaded
        )

    def served(self, model: ModelName, version: Version | None = None) -> Served:
        """The release that would answer such a request, or `NotFound`."""
        return _served(self._choose(model, version)[0], self._placement(model))

    def _placement(self, model: ModelName) -> _Placement:
        placement = self._placements.get(model)
        if placement is None:
            served = ", ".join(sorted(self._placements)) or "none yet"
            raise NotFound(f"model {model!r} is not served here", field="model", fix=f"models here: {served}")
        return placement

    def _choose(self, model: ModelName, version: Version | None) -> tuple[Loaded, Loaded | None]:
        placement = self._placement(model)
        if version is None:
            return placement.current, placement.stand_in
        for loaded in (placement.current, placement.fallback):
            if loaded and loaded.version == version:
                return loaded, None
        running = f"leave the version out, or ask for {placement.current.version}"
        raise NotFound(f"version {version!r} of {model} is not served here", field="version", fix=running)

    def _submit(self, request: _Request) -> "Future[Inference]":
        if self._closed:
            raise Unavailable("the inference server is stopping")
        if not self._room.acquire(blocking=False):
            raise Overloaded("all cores are busy and the queue is full", fix="try again a little later")
        pinned = [loaded for loaded in (request.first, request.second) if loaded]

        def leave(_: object) -> None:
            for loaded in pinned:
                loaded.unpin()
            self._room.release()
            self._finished += 1  # threads may overwrite each other's, and it still changes

        for loaded in pinned:
            loaded.pin()
        future = self._pool.submit(self._answer, request)
        # At the work's end, not the caller's: a caller who gives up does not stop the engine.
        future.add_done_callback(leave)
        return future

    def _answer(self, request: _Request) -> Inference:
        """On a worker thread: the answer of the first release or, when it fails, of the second."""
        first, second = request.first, request.second
        tried = self._attempt(first, request)
        if tried.good or second is None:
            return self._deliver(first, tried, request, judged=True)
        other = self._attempt(second, request)
        if not other.good:
            self._recorder.record(second.model, second.version, None, error=True)
            return self._deliver(first, tried, request, judged=False)
        first.count(error=True)
        self._recorder.record(first.model, first.version, None, error=True)
        return self._deliver(second, other, request, judged=True)

    def _attempt(self, loaded: Loaded, request: _Request) -> Attempt:
        started_at = self._clock.monotonic()
        tried = attempt(loaded, request.feeds, request.outputs)
        loaded.measure(
            failed=not tried.good,
            queue_s=started_at - request.admitted_at,
            compute_s=self._clock.monotonic() - started_at,
            now=self._clock.now(),
        )
        return tried

    def _deliver(self, loaded: Loaded, tried: Attempt, request: _Request, *, judged: bool) -> Inference:
        """Count the attempt and hand its outcome to the caller."""
        if judged:
            loaded.count(error=not tried.good)
        latency_s = None if tried.failure else self._clock.monotonic() - request.admitted_at
        self._recorder.record(loaded.model, loaded.version, latency_s, error=not tried.good)
        if tried.failure:
            raise tried.failure
        return Inference(tried.outputs or {}, loaded.version)


def _served(loaded: Loaded, placement: _Placement) -> Served:
    return Served(
        model=loaded.model,
        version=loaded.version,
        inputs=loaded.inputs,
        outputs=loaded.outputs,
        current=loaded is placement.current,
        probation=placement.probation,
        statistics=loaded.statistics(),
    )


async def _retired(loaded: Loaded | None) -> None:
    if loaded:
        await asyncio.shield(asyncio.wrap_future(loaded.retire()))
