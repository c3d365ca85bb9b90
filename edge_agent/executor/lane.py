"""One model's update under way: events in, state saved, effects carried out, results come back as events.

The order within an event is what makes a crash harmless: the next state is on the disk before anything is done about
it. Quick effects are done on the spot; slow ones become the lane's one piece of work, which ends in an event. New work
or `Cancel` ends the old work first, and an event of work that was cancelled is never taken up.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterator

from opentelemetry import trace

from common.errors import FerryError, StorageFailed, StorageFull, Unavailable
from common.ids import Digest
from common.observability import context_from
from common.wire import Shadow, Split
from edge_agent.executor import trial
from edge_agent.executor.acquire import Acquisition
from edge_agent.executor.parts import Parts
from edge_agent.inference.run_time import FEW_RUNS, RUNS, median_run_s
from edge_agent.inference.serving import Candidate
from edge_agent.update import Installed, ModelState, Stage, step, wanted_downloads
from edge_agent.update import events as ev
from edge_agent.update.outcomes import expected

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

Work = Coroutine[None, None, ev.Event]


class Lane:
    """Runs the update machine for one model. `state` is what the journal holds, `detail` what else there is to say: why
    it cannot be written, or what is the matter with a slot.
    """

    def __init__(self, parts: Parts, state: ModelState) -> None:
        self.state = state
        self._stuck = ""
        self._remark = ""
        self._deferred = ""
        self._parts = parts
        self._queue: asyncio.Queue[tuple[ev.Event, int | None]] = asyncio.Queue()
        self._moved = asyncio.Event()
        self._turn = 0
        self._work: asyncio.Task[None] | None = None
        self._waiting = False
        self._candidate: Candidate | None = None
        self._acquisition: Acquisition | None = None
        self._downloads = set(wanted_downloads(state))
        self._switched_at = 0.0
        self._consumer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take events from now on."""
        self._consumer = asyncio.create_task(self._consume(), name=f"lane-{self.state.model}")

    @property
    def ended(self) -> bool:
        """Whether it takes no events (any more)."""
        return self._consumer is None or self._consumer.done()

    async def stop(self) -> None:
        """Stop where it stands; the journal knows the rest."""
        if self._consumer is not None:
            self._consumer.cancel()
            await asyncio.gather(self._consumer, return_exceptions=True)
        await self._cancel()

    def feed(self, event: ev.Event) -> None:
        """Something happened."""
        self._queue.put_nowait((event, None))

    @property
    def detail(self) -> str:
        """A sentence for the report; empty when there is nothing the state does not say itself."""
        return self._stuck or self._deferred or self._remark

    def remark(self, what: str) -> None:
        """Something about the slots for the report, until the next remark."""
        if what != self._remark:
            self._remark = what
            self._parts.changed()

    def _defer(self, why: str) -> None:
        """What a load waits for, for the report."""
        if why != self._deferred:
            self._deferred = why
            self._parts.changed()

    def wants(self, download: Digest) -> bool:
        """Whether the update under way goes on from that download."""
        return download in wanted_downloads(self.state)

    def nudge(self) -> None:
        """The world has changed: if the update waits to try again, let it try now."""
        if self._waiting:
            self.feed(ev.RetryDue(at=self._parts.clock.now()))

    def look_again(self) -> None:
        """If the update waits for a cheaper way than its budget allows, see whether there is one now."""
        if self.state.stage is Stage.FETCHING and (self._work is None or self._work.done()):
            self.feed(ev.RetryDue(at=self._parts.clock.now()))

    async def settled(self) -> None:
        """Return when every event so far, and every event from those, has been dealt with (not the work they began), or
        when the journal cannot be written: that is waited for, but not by those who want to serve.
        """
        joined = asyncio.ensure_future(self._queue.join())
        while not (joined.done() or self._stuck):
            self._moved.clear()
            moved = asyncio.ensure_future(self._moved.wait())
            await asyncio.wait({joined, moved}, return_when=asyncio.FIRST_COMPLETED)
            moved.cancel()
        joined.cancel()

    async def loaded(self) -> None:
        """Return when a candidate that is all the model has is loaded, or will not be for now.

        After a restart in the first release's probation there is nothing older that could answer meanwhile.
        """
        loading = {Stage.WARMING, Stage.REPLACING, Stage.SWITCHING}
        while self.state.stage in loading and not (self.state.installed or self.state.trouble or self._stuck):
            self._moved.clear()
            await self._moved.wait()

    async def _consume(self) -> None:
        while True:
            event, turn = await self._queue.get()
            try:
                if turn is None or turn == self._turn:
                    await self._handle(event)
            except Exception:  # the state is as it was saved; the next event, order or restart goes on from there
                logger.exception("an update step broke", extra={"model": self.state.model})
            finally:
                self._moved.set()
                self._queue.task_done()

    async def _handle(self, event: ev.Event) -> None:
        before = self.state
        state, effects = step(before, event)
        if isinstance(event, ev.Restarted):  # what is installed answers, whatever the journal's disk says
            for effect in effects:
                if isinstance(effect, ev.Serve):
                    await self._carry_out(effect)
            effects = tuple(effect for effect in effects if not isinstance(effect, ev.Serve))
        if state != before:
            await self._save(state)
            self.state = state
            self._downloads |= wanted_downloads(state)
            _log(before, state, event)
            self._parts.changed()
        for effect in effects:
            await self._carry_out(effect)

    async def _save(self, state: ModelState) -> None:
        """Nothing is done before it is written down, so a disk that takes nothing is waited for."""
        attempt = 0
        while True:
            try:
                await asyncio.to_thread(self._parts.journal.save, state)
            except (StorageFull, StorageFailed) as error:
                self._stick(f"waiting for the disk: {error}")
                await asyncio.sleep(self._parts.limits.backoff.delay_s(attempt, self._parts.chance.random()))
                attempt += 1
            else:
                return self._stick("")

    def _stick(self, why: str) -> None:
        if why != self._stuck:
            self._stuck = why
            if why:
                logger.warning("cannot write the journal; %s", why, extra={"model": self.state.model})
            self._moved.set()
            self._parts.changed()

    async def _carry_out(self, effect: ev.Effect) -> None:
        """One effect: at once if it is quick, otherwise as the lane's work."""
        work = self._work_for(effect)
        if work is not None:
            keep = isinstance(effect, ev.Mirror)
            await self._begin(type(effect).__name__.lower(), work, keep_candidate=keep)
            return
        server, model = self._parts.server, self.state.model
        match effect:
            case ev.Cancel():
                await self._cancel()
            case ev.Serve(installed=installed, awake=awake):
                await self._serve(installed, awake=awake)
            case ev.Switch(split=split):
                # On the spot: an order that already waits must find the model in probation, not half switched.
                await self._handle(self._switch(split))
            case ev.Divide(split=split):
                server.divide(model, split)
            case ev.Commit():
                await server.commit(model)
            case ev.StopServing():
                await server.stop_for_next(model)
            case ev.Revert():
                await self._revert()
            case ev.Retire():
                await server.retire(model)
            case ev.Tidy():
                await self._tidy()
            case _:
                raise AssertionError(f"unknown effect {effect}")

    def _work_for(self, effect: ev.Effect) -> Work | None:
        parts, model = self._parts, self.state.model
        work: Work | None = None
        match effect:
            case ev.Fetch():
                work = self._acquire().fetch(self.state)
            case ev.Build(sources=sources, slot=slot):
                work = self._acquire().build(self.state, sources, slot)
            case ev.Warm(candidate=candidate):
                work = self._warm(candidate)
            case ev.Mirror(terms=terms):
                work = self._shadow(terms)
            case ev.Watch(probation_s=probation_s):
                work = trial.watch(parts, model, self._switched_at, probation_s)
            case ev.Probe():
                work = trial.probe(parts, model)
            case ev.Wait(attempt=attempt):
                work = self._wait(attempt)
        return work

    def _acquire(self) -> Acquisition:
        """The acquisition for the order under way, the same from its fetch to its build."""
        target = expected(self.state)
        if self._acquisition is None or self._acquisition.target != target:
            self._acquisition = Acquisition(self._parts, target)
        return self._acquisition

    async def _serve(self, installed: Installed, *, awake: bool) -> None:
        parts, model = self._parts, self.state.model
        cold = parts.cold(model)
        if awake and model in parts.server.in_memory():
            return  # a request of before the load
        if awake or cold.mode == "resident":
            trouble = await trial.serve(parts, model, installed)
        else:
            trouble = await trial.rest(parts, model, installed, build=cold.mode == "prewarmed")
        if trouble is not None:
            self.feed(trouble)
        if trouble is not None and awake:
            await parts.server.retire(model)
            fix = "the device's report has the details"
            parts.server.waking.failed(model, Unavailable(f"{model} could not be loaded", fix=fix))

    async def _revert(self) -> None:
        """What stood behind the candidate answers again; if memory did not hold it, it is loaded."""
        server, model = self._parts.server, self.state.model
        await server.revert(model, next_follows=self.state.installed is not None)
        if self.state.installed and model not in server.in_memory():
            await self._serve(self.state.installed, awake=True)

    async def _warm(self, release: Installed) -> ev.Event:
        if (
            self._parts.pacing
            and self.state.stage is Stage.WARMING
            and not await trial.needs_no_load(self._parts, self.state.model, release)
        ):
            await self._parts.pacing.clear(self._defer)
        found = await trial.warm(self._parts, self.state.model, release, self.state.installed)
        if isinstance(found, ev.Event):
            return found
        self._candidate = found
        run_s = await self._measured(found) if expected(self.state).measure else None
        return ev.Warmed(at=self._parts.clock.now(), run_s=run_s)

    async def _measured(self, candidate: Candidate) -> float | None:
        """Median seconds of a run; with few runs where nothing answers meanwhile."""
        runs = FEW_RUNS if self.state.stage is Stage.REPLACING else RUNS
        return await asyncio.to_thread(median_run_s, candidate.loaded, self._parts.clock.monotonic, runs)

    async def _shadow(self, terms: Shadow) -> ev.Event:
        if self._candidate is None:
            raise AssertionError("compared before it was warm")
        return await trial.shadow(self._parts, self._candidate, terms)

    def _switch(self, split: Split | None) -> ev.Event:
        if self._candidate is None:
            raise AssertionError("switched before it was warm")
        with self._span("switch"):
            self._parts.server.switch(self._candidate, split)
        self._candidate = None
        self._switched_at = self._parts.clock.monotonic()
        return ev.Switched(at=self._parts.clock.now())

    async def _wait(self, attempt: int) -> ev.Event:
        self._waiting = True
        try:
            await asyncio.sleep(self._parts.limits.backoff.delay_s(attempt, self._parts.chance.random()))
        finally:
            self._waiting = False
        return ev.RetryDue(at=self._parts.clock.now())

    async def _tidy(self) -> None:
        state = self.state
        keep = {release.slot for release in (state.installed, state.candidate, state.previous) if release is not None}
        wanted = wanted_downloads(state)
        dropped, self._downloads = self._downloads - wanted, set(wanted)
        with self._left_for_the_next_start():
            await asyncio.to_thread(self._parts.slots.tidy, state.model, keep, dropped)
        if self._parts.optimised:
            served = [release.identity for release in (state.installed, state.candidate) if release is not None]
            with self._left_for_the_next_start():
                await asyncio.to_thread(self._parts.optimised.tidy, state.model, served)

    @contextlib.contextmanager
    def _left_for_the_next_start(self) -> Iterator[None]:
        """What cannot be removed is in nobody's way: the effects that follow matter more than the room."""
        try:
            yield
        except (FerryError, OSError) as error:
            logger.warning("cannot remove what is not needed any more: %s", error, extra={"model": self.state.model})

    async def _begin(self, name: str, work: Work, *, keep_candidate: bool = False) -> None:
        kept, self._candidate = (self._candidate, None) if keep_candidate else (None, self._candidate)
        try:
            await self._cancel()
        except asyncio.CancelledError:
            work.close()  # it never began
            raise
        finally:
            self._candidate = kept
        self._work = asyncio.create_task(self._run(name, work, self._turn), name=f"{name}-{self.state.model}")

    async def _run(self, name: str, work: Work, turn: int) -> None:
        try:
            with self._span(name) as span:
                event = await work
                span.set_attribute("ferry.result", type(event).__name__)
        except Exception as error:  # whatever it was, an update must not hang on it
            logger.exception("the work of an update broke", extra={"model": self.state.model, "work": name})
            event = ev.Interrupted(at=self._parts.clock.now(), code="internal", detail=repr(error))
        self._queue.put_nowait((event, turn))

    async def _cancel(self) -> None:
        """End the work under way; its event, even if it is in the queue already, belongs to a turn that is over."""
        self._turn += 1
        work, self._work = self._work, None
        if work is not None:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            await self._parts.server.discard(candidate)

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[trace.Span]:
        """A span of the trace that the order began."""
        state = self.state
        attributes = {"ferry.model": state.model, "ferry.version": state.target.version if state.target else ""}
        with tracer.start_as_current_span(
            f"update.{name}", context=context_from(state.traceparent), attributes=attributes
        ) as span:
            yield span


def _log(before: ModelState, state: ModelState, event: ev.Event) -> None:
    extra = {"model": state.model, "stage": state.stage, "event": type(event).__name__}
    if state.last_update is not None and state.last_update != before.last_update:
        update = state.last_update
        reason = {"outcome": update.outcome, "reason": update.reason, "detail": update.detail}
        level = logging.INFO if update.outcome == "succeeded" else logging.WARNING
        logger.log(level, "update finished: %s", update.version, extra=extra | reason)
    elif state.trouble and state.trouble != before.trouble:
        logger.warning("update interrupted: %s", state.trouble, extra=extra)
    else:
        logger.info("update: %s to %s", before.stage, state.stage, extra=extra)
