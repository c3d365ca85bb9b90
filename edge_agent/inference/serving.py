"""The models that a device serves, and how one release takes over from another without a request being lost.

A release goes prepare -> switch -> commit, or back:

- `prepare` loads and warms it beside the running one, on a throw-away thread of the lowest priority, and lets it
  answer the samples of its self-test, if it carries one.
- `switch` replaces one reference. The previous release stays in memory as the fallback: a request for which the new
  release raises or gives a NaN or an infinity is answered by the previous one, and counted against the new one. When
  the previous release fails on the same request too, the input is to blame and nobody is judged by it.
- `commit` lets the fallback go, `revert` puts it back. A request finishes on the sessions it started with; a session
  is closed when its last request has left.

A request that names a version is answered by that version or by an error, never by another one. A fallback whose
inputs or outputs have other names or types than the new release's stands by for `revert` only.

All methods are called on one event loop, but for `infer_here`, `submit` and `models`; inference runs on as many threads
as there are cores, behind a bounded queue (`edge_agent.inference.flow`). The server does not judge:
`edge_agent.inference.health` does, and whoever runs the update acts on it.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import msgspec

from common.artifact import TensorSpec
from common.artifact.samples import Sample
from common.artifact.selftest import SelfTest
from common.artifact.tensors import Array
from common.clock import Clock
from common.errors import Conflict
from common.ids import ModelName, Version
from edge_agent.inference.answering import Answering, Recorder
from edge_agent.inference.engine import Engine, EngineFailure, Session
from edge_agent.inference.flow import FlowLimits, RequestFlow, Terms
from edge_agent.inference.health import Health
from edge_agent.inference.loaded import Loaded, Statistics
from edge_agent.inference.niced import run_niced
from edge_agent.inference.placement import Placement, Placements
from edge_agent.inference.requests import Inference
from edge_agent.inference.scheduling import PRIORITY_DEFAULT, WaitingLimits
from edge_agent.inference.selftest import SamplesFile, Tested, check_answers, measure
from edge_agent.inference.trial import ModelRejected, check, probe
from edge_agent.inference.watch import NEVER_S, WatchTerms, open_watch

QUEUE_REQUESTS_MAX = 256
"""Requests that may wait for a core; one more is refused at once."""

RUN_S_MAX = 60.0
"""The engine is stopped when it takes longer for a request: a model may loop for ever on one input."""


class Candidate(NamedTuple):
    """A release that is loaded, checked and warm, and does not serve yet. `tested` is how its self-test went."""

    model: ModelName
    version: Version
    loaded: Loaded
    tested: Tested | None = None


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


class ModelServer:
    """Serves models by name; see the module's text for the life of a release.

    `workers` is the number of inferences at one time (default: the cores that this process may use), `queue` how many
    more may wait, `run_s_max` how many seconds the engine may take for one of them, `sample_interval_s` the time
    between two requests to a release that are sampled for drift.
    """

    def __init__(
        self,
        engine: Engine,
        recorder: Recorder,
        clock: Clock,
        *,
        workers: int | None = None,
        queue: int = QUEUE_REQUESTS_MAX,
        run_s_max: float = RUN_S_MAX,
        sample_interval_s: float = NEVER_S,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._recorder = recorder
        self._placements = Placements()
        cores = workers or len(os.sched_getaffinity(0))
        limits = FlowLimits(WaitingLimits(queue), run_s_max)
        self._flow = RequestFlow(self._placements, Answering(recorder, clock), clock, cores, limits)
        self._loading = asyncio.Lock()
        self._sample_interval_s = sample_interval_s

    @property
    def finished(self) -> int:
        """A number that changes whenever a request has left its thread, however it went."""
        return self._flow.finished

    async def pulse(self) -> None:
        """Return when an inference thread has come back for work."""
        await asyncio.wrap_future(self._flow.pulse())

    @property
    def platform(self) -> str:
        """The engine's name in model metadata."""
        return self._engine.platform

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._flow.closed

    async def infer(
        self,
        model: ModelName,
        version: Version | None,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        priority: int = PRIORITY_DEFAULT,
        timeout_s: float | None = None,
    ) -> Inference:
        """The model's answer to `feeds` (input name to array of the declared type and shape).

        Without `version` the release in service answers, and during probation the previous one in its place if need
        be. `outputs` picks some outputs by name; None means all. `priority` is 1 (first) to 9; a request that could not
        be started within `timeout_s` never is.

        Raises `NotFound` (model or version is not served), `InvalidInput` (names the tensor and what is expected),
        `Overloaded` and `DeadlineExceeded` (nothing was started), `EngineFailure` (the model raised).
        """
        return await self._flow.infer(model, version, feeds, outputs, Terms(priority, timeout_s))

    def infer_here(
        self,
        model: ModelName,
        version: Version | None,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        priority: int = PRIORITY_DEFAULT,
        timeout_s: float | None = None,
    ) -> Inference:
        """`infer` for callers without a loop, on any thread: when a core is free the caller's own thread runs it."""
        return self._flow.infer_here(model, version, feeds, outputs, Terms(priority, timeout_s))

    def submit(
        self,
        model: ModelName,
        version: Version | None,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        priority: int = PRIORITY_DEFAULT,
        timeout_s: float | None = None,
    ) -> "Future[Inference]":
        """`infer` for callers on other loops: never waits; a request whose future is cancelled in time is not run."""
        return self._flow.submit(model, version, feeds, outputs, Terms(priority, timeout_s))

    def turned_away(self, model: ModelName, version: Version) -> None:
        """Count a request to that release for which there was no room before it got here."""
        self._recorder.not_run(model, version, "refused")

    async def prepare(
        self,
        model: ModelName,
        version: Version,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        samples: SamplesFile | None = None,
        reference: Path | None = None,
    ) -> Candidate:
        """Load the model file at `path`, check it against the manifest's `inputs` and `outputs`, warm it up, and let it
        answer its `samples`. With the file of a `reference` some of its requests will be sampled for drift.

        One load at a time, at the lowest priority; only the time that samples take is measured at that of requests.
        Raises `ModelRejected` (`SelfTestFailed` for wrong answers) when the release is at fault; `NotFound` (no file)
        and `Unavailable` (no memory) say nothing about it.
        """

        def load() -> tuple[Session, tuple[Sample, ...]]:
            session = self._engine.load(path)
            with _closed_on_failure(session):
                check(session, inputs, outputs)
                return session, check_answers(session, samples, inputs, outputs) if samples else ()

        def timed(session: Session, answered: tuple[Sample, ...], terms: SelfTest) -> Tested:
            with _closed_on_failure(session):
                return measure(session, answered, terms, self._clock.monotonic)

        async with self._loading:
            try:
                session, answered = await run_niced(load, f"load-{model}@{version}")
            except EngineFailure as error:
                raise ModelRejected(error.message) from error
            tested = await asyncio.to_thread(timed, session, answered, samples.terms) if samples else None
        watch = await asyncio.to_thread(open_watch, WatchTerms(reference, self._sample_interval_s), inputs, outputs)
        return Candidate(model, version, Loaded(model, version, session, inputs, outputs, watch=watch), tested)

    def switch(self, candidate: Candidate) -> None:
        """Let the candidate answer from the next request on; what ran before becomes its fallback.

        Raises `Conflict` while an earlier switch of the model is neither committed nor reverted.
        """
        before = self._placements.get(candidate.model)
        if before and before.probation:
            running = f"{candidate.model}@{before.current.version} is in probation"
            raise Conflict(running, fix="commit or revert it first")
        fallback = before.current if before else None
        self._placements[candidate.model] = Placement(candidate.loaded, fallback, probation=True)

    def health(self, model: ModelName) -> Health:
        """How requests to the release in service have gone since it was switched to."""
        return self._placements.of(model).current.health()

    async def self_probe(self, model: ModelName, count: int) -> Health:
        """Run `count` synthetic requests on the release in service, at the lowest priority, and say how they went.

        They are neither in `health` nor in the telemetry: for probation on a device that nobody calls.
        """
        loaded = self._placements.of(model).current
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
        current, fallback, _ = self._placements.of(model)
        self._placements[model] = Placement(current, None, probation=False)
        await _retired(fallback)

    async def revert(self, model: ModelName) -> None:
        """Undo the switch: the fallback serves again (without one the model is out of service).

        Returns when the new release's last request has left and it is closed. Raises `Conflict` outside probation.
        """
        current, fallback, probation = self._placements.of(model)
        if not probation:
            raise Conflict(f"{model}@{current.version} is committed", fix="switch to the release you want instead")
        if fallback:
            self._placements[model] = Placement(fallback, None, probation=False)
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
        self._flow.refuse_new()
        await asyncio.gather(*(self.retire(model) for model in list(self._placements)))
        self._flow.close()

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
        return _served(self._placements.choose(model, version)[0], self._placements.of(model))


@contextlib.contextmanager
def _closed_on_failure(session: Session) -> Iterator[None]:
    try:
        yield
    except BaseException:
        session.close()
        raise


def _served(loaded: Loaded, placement: Placement) -> Served:
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
