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

Between `prepare` and `switch` live requests may be put to the candidate too (`mirroring`). `switch` may leave a share
of them to the release before (`split`, see `edge_agent.inference.sides`).

How requests come in is in `edge_agent.inference.entrance`. All methods are called on one event loop, but for those that
say otherwise there, and those that only tell (`require`, `served`, `split`, `models`). The server does not judge:
`edge_agent.inference.health` does, and whoever runs the update acts on it.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from common.artifact import TensorSpec
from common.artifact.samples import Sample
from common.artifact.selftest import SelfTest
from common.artifact.serving import ServingChanges, ServingTerms
from common.clock import Clock
from common.errors import Conflict, NotFound
from common.ids import ModelName, Version
from common.wire import Shadow, ShadowReport, Split, SplitReport
from edge_agent.inference.answering import Answering, Recorder
from edge_agent.inference.asleep import Waking
from edge_agent.inference.engine import Beside, Engine, EngineFailure, Session
from edge_agent.inference.entrance import Entrance
from edge_agent.inference.flow import FlowLimits, RequestFlow
from edge_agent.inference.health import Health
from edge_agent.inference.kept_terms import KeptTerms, kept_terms
from edge_agent.inference.loaded import Loaded, Statistics
from edge_agent.inference.mirror import Chances, Mirror
from edge_agent.inference.niced import run_niced
from edge_agent.inference.opening import Extras, Load, Opened, open_release
from edge_agent.inference.placement import Placement, Placements
from edge_agent.inference.recall import CACHE_BYTES_MAX, Recall
from edge_agent.inference.scheduling import BATCH_BYTES_MAX, WaitingLimits
from edge_agent.inference.selftest import SamplesFile, Tested, check_answers, measure, read_samples
from edge_agent.inference.timelimit import TimeLimited
from edge_agent.inference.trial import ModelRejected, check_runs, check_signature, probe
from edge_agent.inference.warming import warm
from edge_agent.inference.watch import NEVER_S, WatchTerms, open_watch

logger = logging.getLogger(__name__)

QUEUE_REQUESTS_MAX = 256
"""Requests that may wait for a core; one more is refused at once."""

RUN_S_MAX = 60.0
"""The engine is stopped when it takes longer for a request: a model may loop for ever on one input."""

NO_EXTRAS = Extras()


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
    in_memory: bool = True
    """False for a model that the next request loads."""


class ModelServer(Entrance):
    """Serves models by name; see the module's text for the life of a release.

    `workers` is the number of inferences at one time (default: the cores that this process may use), `queue` how many
    more may wait, `run_s_max` how many seconds the engine may take for one of them. `batch_bytes_max` bounds the
    inputs and answers of one batch, `cache_bytes_max` the answers that all releases keep together; `changes` are
    what the owner says of how models are served. `sample_interval_s` is the time between two requests to a release that
    are sampled for drift. `on_demand` says which models callers may load and unload.
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
        batch_bytes_max: int = BATCH_BYTES_MAX,
        cache_bytes_max: int = CACHE_BYTES_MAX,
        changes: Mapping[ModelName, ServingChanges] | None = None,
        sample_interval_s: float = NEVER_S,
        on_demand: Callable[[ModelName], bool] = lambda _: False,
    ) -> None:
        self._engine = engine
        self._run_s_max = run_s_max
        self._recorder = recorder
        self._placements = Placements()
        self._changes = changes or {}
        self._recall = Recall(clock, cache_bytes_max)
        cores = workers or len(os.sched_getaffinity(0))
        limits = FlowLimits(WaitingLimits(queue, batch_bytes_max=batch_bytes_max), run_s_max)
        waking = Waking(self._placements.asleep)
        answering = Answering(recorder, clock, self._recall)
        flow = RequestFlow(self._placements, answering, clock, cores, limits, wake=waking.wanted)
        super().__init__(flow, waking, clock)
        self._loading = asyncio.Lock()
        self._sample_interval_s = sample_interval_s
        self._batch_bytes_max = batch_bytes_max
        self.may_rest = on_demand
        self._resting: dict[ModelName, Served] = {}
        self._switched_at: dict[ModelName, float] = {}

    @property
    def platform(self) -> str:
        """The engine's name in model metadata."""
        return self._engine.platform

    def load_plainly(self, path: Path, beside: Beside) -> Session:
        """The engine's own way to make a session of a file; see `Engine.load`."""
        return self._engine.load(path, beside)

    def turned_away(self, model: ModelName, version: Version | None) -> None:
        """Count a request for which there was no room before it got here; `NotFound`."""
        self._recorder.not_run(model, self.served(model, version).version, "refused")

    async def prepare(
        self,
        model: ModelName,
        version: Version,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        samples: SamplesFile | None = None,
        extras: Extras = NO_EXTRAS,
        serving: ServingTerms | None = None,
        reference: Path | None = None,
        load: Load | None = None,
    ) -> Candidate:
        """Load the model file at `path` with its `extras` (with `load`, or else as the engine does), check it against
        the manifest's `inputs` and `outputs`, let it answer its `samples`, and warm it up on the sizes that are in use.
        `serving` is how the release wants to be served; with the file of a `reference` some of its requests will be
        sampled for drift.

        One load at a time, at the lowest priority; only the time that samples take is measured at that of requests.
        Raises `ModelRejected` (`SelfTestFailed` for wrong answers) when the release is at fault; `NotFound` (no file),
        `Unavailable` (no memory) and `PluginMissing` say nothing about it.
        """

        before = self._placements.get(model)
        runs = before.current.statistics().runs if before else ()
        session_of = load or (lambda path: self._engine.load(path, extras.beside))

        def tried() -> tuple[Opened, tuple[Sample, ...]]:
            given = read_samples(samples, inputs, outputs) if samples else ()
            opened = open_release(session_of, path, inputs, extras.pipeline, self._run_s_max)
            if given:  # what is made up may be nothing that this model takes
                opened = opened._replace(example=given[0].inputs)
            limited = TimeLimited(opened.session, self._run_s_max)
            with _closed_on_failure(opened.session):
                check_signature(opened.session, inputs, outputs)
                if samples:
                    check_answers(limited, given, samples.terms)
                check_runs(limited, outputs, opened.example)
                if opened.row_wise:
                    warm(limited, inputs, outputs, opened.example, runs, bytes_max=self._batch_bytes_max)
                return opened, given

        def convincing() -> tuple[Opened, tuple[Sample, ...]]:
            try:
                return tried()
            except (EngineFailure, ModelRejected) as error:
                if not self._engine.doubt(path):
                    raise
                logger.warning("loaded in another way: %s", error, extra={"model": model})
            return tried()

        def timed(session: Session, answered: tuple[Sample, ...], terms: SelfTest) -> Tested:
            with _closed_on_failure(session):
                return measure(session, answered, terms, self._clock.monotonic)

        async with self._loading:
            try:
                opened, answered = await run_niced(convincing, f"load-{model}@{version}")
            except EngineFailure as error:
                raise ModelRejected(error.message) from error
            tested = await asyncio.to_thread(timed, opened.session, answered, samples.terms) if samples else None
        terms = self._changes.get(model, ServingChanges()).applied(serving or ServingTerms())
        watch = await asyncio.to_thread(open_watch, WatchTerms(reference, self._sample_interval_s), inputs, outputs)
        loaded = Loaded(model, version, opened, inputs, outputs, serving=terms, watch=watch)
        self._flow.router.learn(loaded)
        return Candidate(model, version, loaded, tested)

    @contextlib.contextmanager
    def mirroring(self, candidate: Candidate, terms: Shadow) -> Iterator[Mirror]:
        """Put live requests of the model to the candidate as well, for the time of the block, and compare."""
        chances = Chances(lambda: self._flow.free, random.random)
        mirror = Mirror(candidate.loaded, terms, chances, self._clock, self._run_s_max)
        self._flow.mirrors[candidate.model] = mirror
        try:
            yield mirror
        finally:
            del self._flow.mirrors[candidate.model]
            mirror.close()

    def switch(self, candidate: Candidate, split: Split | None = None) -> None:
        """Let the candidate answer from the next request on, or some of them; what ran before becomes its fallback.

        Raises `Conflict` while an earlier switch of the model is neither committed nor reverted.
        """
        before = self._placements.get(candidate.model)
        if before and before.probation:
            running = f"{candidate.model}@{before.current.version} is in probation"
            raise Conflict(running, fix="commit or revert it first")
        fallback = before.current if before else None
        stood = fallback.statistics() if fallback else None
        self._placements[candidate.model] = Placement(candidate.loaded, fallback, True, split, stood)
        self._switched_at[candidate.model] = self._clock.now()
        self._forget_why_not(candidate.model)
        self.waking.woken(candidate.model)

    def divide(self, model: ModelName, split: Split | None) -> None:
        """Divide the requests otherwise from now on; nothing happens outside probation."""
        placement = self._placements.of(model)
        if placement.probation:
            self._placements[model] = placement._replace(split=split)

    def split(self, model: ModelName) -> Split | None:
        """How the model's requests are divided now."""
        placement = self._placements.get(model)
        return placement.split if placement else None

    def sides(self, model: ModelName) -> SplitReport | None:
        """How both releases have done since the switch, where requests are split."""
        return self._placements.of(model).sides()

    def traffic(self) -> dict[ModelName, SplitReport | ShadowReport]:
        """What both sides of each release on trial have done until now."""
        shadows = {model: mirror.report() for model, mirror in list(self._flow.mirrors.items())}
        splits = {model: placement.sides() for model, placement in list(self._placements.items())}
        return {model: sides for model, sides in splits.items() if sides} | shadows

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
                return probe(loaded, loaded.example, loaded.output_names, count)
            finally:
                loaded.unpin()

        return await run_niced(work, f"probe-{model}@{loaded.version}")

    async def commit(self, model: ModelName) -> None:
        """End the probation well: let the fallback go, and return when its last request has left and it is closed.

        Without a probation there is nothing to do.
        """
        current, fallback, *_ = self._placements.of(model)
        self._placements[model] = Placement(current, None, probation=False)
        await self._retired(fallback)

    async def revert(self, model: ModelName, *, next_follows: bool = False) -> None:
        """Undo the switch: the fallback serves again. Without one the model is out of service; if `next_follows`,
        requests get `BeingReplaced` until another release is switched to.

        Returns when the new release's last request has left and it is closed. Raises `Conflict` outside probation.
        """
        current, fallback, probation, *_ = self._placements.of(model)
        if not probation:
            raise Conflict(f"{model}@{current.version} is committed", fix="switch to the release you want instead")
        if fallback:
            self._placements[model] = Placement(fallback, None, probation=False)
        else:
            if next_follows:
                self._placements.stopped.add(model)
            del self._placements[model]
        await self._retired(current)

    def is_idle(self, model: ModelName, idle_s: float) -> bool:
        """Whether the model is in memory, out of probation, and had no request for `idle_s` seconds."""
        placement = self._placements.get(model)
        if placement is None or placement.probation:
            return False
        latest = max(placement.current.asked_at, self._switched_at.get(model, 0.0))
        return self._clock.now() - latest >= idle_s

    async def rest(self, model: ModelName, release: Served | None = None) -> None:
        """Let the model out of memory until somebody asks for it; `release` describes one that was not in memory yet.

        Returns when its last request has left and its session is closed. A model that is neither is left alone.
        """
        placement = self._placements.get(model)
        resting = release or (_served(placement.current, placement) if placement else None)
        if resting is None:
            return
        self.waking.sleeps(model)
        self._resting[model] = msgspec.structs.replace(resting, in_memory=False)
        self._placements.asleep.add(model)
        self._placements.pop(model, None)
        if placement:
            await asyncio.gather(self._retired(placement.current), self._retired(placement.fallback))

    def _forget_why_not(self, model: ModelName) -> None:
        self._placements.stopped.discard(model)
        self._placements.asleep.discard(model)
        self._resting.pop(model, None)

    async def stop_for_next(self, model: ModelName) -> None:
        """Take the model's release out of memory for the next one; requests get `BeingReplaced` until a switch.

        Returns when its last request has left and it is closed. A model that is not served is not stopped.
        """
        if model in self._placements:
            self._placements.stopped.add(model)
            await self._retired(self._placements.pop(model).current)

    async def retire(self, model: ModelName) -> None:
        """Take the model out of service; requests that are under way are still answered. Unknown models are ignored."""
        self._forget_why_not(model)
        placement = self._placements.pop(model, None)
        if placement:
            await asyncio.gather(self._retired(placement.current), self._retired(placement.fallback))

    async def discard(self, candidate: Candidate) -> None:
        """Close a candidate that will not be switched to."""
        await self._retired(candidate.loaded)

    async def close(self) -> None:
        """Refuse new requests, answer those that are under way, close everything."""
        self._flow.refuse_new()
        self.waking.close()
        await asyncio.gather(*(self.retire(model) for model in list(self._placements)))
        self._flow.close()

    def models(self) -> tuple[Served, ...]:
        """Every release that can answer, by model name, the current one first; those included that a request loads."""
        in_memory = [
            _served(loaded, placement)
            for _, placement in sorted(self._placements.items())
            for loaded in (placement.current, placement.fallback)
            if loaded
        ]
        return tuple(sorted([*in_memory, *self._resting.values()], key=lambda one: one.model))

    def answered(self) -> tuple[int, float]:
        """Requests that the releases in memory have answered, and in how many seconds, queueing included."""
        placements = list(self._placements.values())
        releases = [one for placement in placements for one in (placement.current, placement.fallback) if one]
        counts = [one.statistics() for one in releases]
        return sum(one.answered for one in counts), sum(one.answered_s for one in counts)

    def in_memory(self) -> frozenset[ModelName]:
        """The models of which a release is in memory."""
        return frozenset(self._placements)

    def kept_terms(self) -> tuple[KeptTerms, ...]:
        """How the terms of the releases in service are kept, of those that have any."""
        current = [placement.current for _, placement in sorted(self._placements.items())]
        router = self._flow.router
        return tuple(kept_terms(one, self._recall, router) for one in current if one.serving != ServingTerms())

    def shadows(self) -> tuple[Served, ...]:
        """Every candidate that live requests are put to; it answers none, and its statistics are of those."""
        return tuple(_mirrored(mirror) for _, mirror in sorted(self._flow.mirrors.items()))

    def require(self, model: ModelName, version: Version | None = None) -> None:
        """Raise `NotFound` if nobody would answer such a request, not even after a load; `BeingReplaced`."""
        if self._resting_one(model, version) is None:
            self._placements.choose(model, version)

    def served(self, model: ModelName, version: Version | None = None) -> Served:
        """The release that would answer such a request; raises as `require`."""
        resting = self._resting_one(model, version)
        if resting is not None:
            return resting
        return _served(self._placements.choose(model, version)[0], self._placements.of(model))

    def _resting_one(self, model: ModelName, version: Version | None) -> Served | None:
        """The release that such a request would load, if it is one that must be; `NotFound`."""
        resting = self._resting.get(model)
        if resting and version not in (None, resting.version):
            fix = f"leave the version out, or ask for {resting.version}"
            raise NotFound(f"version {version!r} of {model} is not served here", field="version", fix=fix)
        return resting

    async def _retired(self, loaded: Loaded | None) -> None:
        if loaded:
            closed = loaded.retire()
            self._recall.forget_when(closed, loaded)
            self._flow.router.forget(loaded)
            await asyncio.shield(asyncio.wrap_future(closed))


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


def _mirrored(mirror: Mirror) -> Served:
    loaded = mirror.candidate
    return Served(loaded.model, loaded.version, loaded.inputs, loaded.outputs, False, False, mirror.statistics())
