"""From signed orders to running models, and back to what is reported.

`accept` takes an order from wherever it came (MQTT, a poll): signature, device and generation are checked, then it is
written to the journal, then each model's lane is told. `start` serves what is installed before any network is touched,
and goes on with what was under way.
"""

import asyncio
import logging

import msgspec
from msgspec.structs import replace

from common.artifact import digest_of
from common.errors import FerryError
from common.ids import DeviceId, Digest, ModelName, Version
from common.wire import DesiredState, ReportedModel
from common.wire.messages import HELD_DIGESTS_MAX, MODELS_PER_DEVICE_MAX, TEXT_CHARS_MAX
from edge_agent.executor.adopting import adopt
from edge_agent.executor.lane import Lane
from edge_agent.executor.parts import Parts
from edge_agent.executor.resting import rest_idle
from edge_agent.executor.scrub import Scrub
from edge_agent.journal import AcceptedOrder
from edge_agent.update import ModelState, Stage, held_digests, open_order, reported_model, wanted_downloads
from edge_agent.update import events as ev
from edge_agent.update.report import serving

logger = logging.getLogger(__name__)


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What the device has to say of itself, apart from the message's envelope."""

    generation: int
    models: tuple[ReportedModel, ...]
    held: tuple[Digest, ...]
    refused: str
    traceparent: str | None

    @property
    def running(self) -> dict[ModelName, Version]:
        """The release that answers for each model."""
        return {entry.model: entry.running for entry in self.models if entry.running is not None}


class Executor:
    """Keeps one lane per model; see the package's text."""

    def __init__(self, parts: Parts, device: DeviceId) -> None:
        self._parts = parts
        self._device = device
        self._lanes: dict[ModelName, Lane] = {}
        self._scrub = Scrub(parts, lambda: list(self._lanes.values()))
        self._scrubbing: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None
        parts.server.waking.ask_for = self._wanted
        self._accepting = asyncio.Lock()
        self._order: AcceptedOrder | None = None
        self._refused = ""
        self._traceparent: str | None = None

    async def start(self) -> None:
        """Serve what is installed, then go on with what was under way and with the newest order."""
        journal, now = self._parts.journal, self._parts.clock.now()
        last = await asyncio.to_thread(journal.begin_run, self._parts.boot)
        states = await asyncio.to_thread(self._remembered)
        await asyncio.to_thread(self._sweep, list(states.values()), flushed_only=last.power_cut)
        for state in states.values():
            lane = self._lane(state)
            await self._check_previous(lane)
            lane.feed(ev.Restarted(at=now, clean=last.clean))
        await asyncio.gather(*(lane.settled() for lane in self._lanes.values()))
        await asyncio.gather(*(lane.loaded() for lane in self._lanes.values()))
        self._order = await asyncio.to_thread(lambda: journal.order)
        if self._order is not None:
            self._tell_again(self._order)
        self._scrubbing = asyncio.create_task(self._scrub.run(), name="scrub")
        self._resting = asyncio.create_task(rest_idle(self._parts, lambda: list(self._lanes.values())), name="rest")

    async def stop(self) -> None:
        """Stop where everything stands, in good order."""
        self._scrub.stop()
        for task in (self._scrubbing, self._resting):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await asyncio.gather(*(lane.stop() for lane in self._lanes.values()))
        await asyncio.to_thread(self._parts.journal.end_run)

    @property
    def etag(self) -> str | None:
        """The strong ETag of the newest accepted order."""
        return f'"{self._order.etag}"' if self._order else None

    async def accept(self, envelope: bytes) -> bool:
        """Follow the order in `envelope`; returns whether it was new. A refusal is reported, not raised."""
        async with self._accepting:
            order = self._order
            if order is not None and digest_of(envelope) == order.etag:
                return self._refuse("")
            try:
                desired = open_order(envelope, self._parts.keys, self._device, order.generation if order else 0)
                accepted = AcceptedOrder(generation=desired.generation, etag=digest_of(envelope), envelope=envelope)
                await asyncio.to_thread(self._parts.journal.accept, accepted)
            except FerryError as error:
                logger.warning("order refused: %s", error, extra={"code": error.code})
                return self._refuse(str(error))
            self._order, self._refused = accepted, ""
            logger.info("order accepted", extra={"generation": desired.generation})
            await self._forget_retired(desired)
            self._tell(desired)
            self._parts.changed()
            return True

    @property
    def ended(self) -> tuple[str, ...]:
        """The lanes that take no events any more; there should be none until `stop`."""
        return tuple(f"lane of {model}" for model, lane in self._lanes.items() if lane.ended)

    def _wanted(self, model: ModelName) -> None:
        """Somebody asks for a model that is not in memory."""
        lane = self._lanes.get(model)
        if lane is not None:
            lane.feed(ev.Wanted(at=self._parts.clock.now()))

    def nudge(self) -> None:
        """The network is back: updates that wait may try now."""
        for lane in self._lanes.values():
            lane.nudge()

    def look_again(self) -> None:
        """A poll was answered: updates that wait for a cheaper way may look for one."""
        for lane in self._lanes.values():
            lane.look_again()

    def standing(self) -> Standing:
        """What to report now. The serving releases' digests come first among `held`, which has a limit."""
        states = sorted((lane.state for lane in self._lanes.values()), key=_in_service_first)
        held = [digest for state in states for digest in held_digests(state)]
        return Standing(
            generation=self._order.generation if self._order else 0,
            models=tuple(self._reported(state) for state in states[:MODELS_PER_DEVICE_MAX]),
            held=tuple(dict.fromkeys(held))[:HELD_DIGESTS_MAX],
            refused=self._refused,
            traceparent=self._traceparent,
        )

    def _reported(self, state: ModelState) -> ReportedModel:
        """With what the state cannot say of itself."""
        reported, detail = reported_model(state), self._lanes[state.model].detail
        return replace(reported, detail=detail[:TEXT_CHARS_MAX]) if detail else reported

    def _tell(self, desired: DesiredState) -> None:
        """Every lane what the order wants of it; being told twice changes nothing."""
        now, wanted = self._parts.clock.now(), {target.model: target for target in desired.models}
        self._traceparent = desired.traceparent
        for model in self._lanes.keys() | wanted.keys():
            lane = self._lanes.get(model) or self._lane(ModelState(model=model))
            if model in wanted:
                lane.feed(ev.Ordered(at=now, target=wanted[model], traceparent=desired.traceparent))
            else:
                lane.feed(ev.Withdrawn(at=now))

    def _tell_again(self, order: AcceptedOrder) -> None:
        """After a restart: some lane may not have been told before it."""
        try:
            self._tell(open_order(order.envelope, self._parts.keys, self._device, order.generation - 1))
        except FerryError as error:
            logger.warning("the accepted order does not verify any more: %s", error)

    async def _forget_retired(self, desired: DesiredState) -> None:
        """A model that an earlier order retired has been reported as gone since; it need not be remembered."""
        wanted = {target.model for target in desired.models}
        for model in [m for m, lane in self._lanes.items() if lane.state.stage is Stage.RETIRED and m not in wanted]:
            await self._lanes.pop(model).stop()
            await asyncio.to_thread(self._parts.journal.forget, model)

    def _refuse(self, why: str) -> bool:
        if why[:TEXT_CHARS_MAX] != self._refused:
            self._refused = why[:TEXT_CHARS_MAX]
            self._parts.changed()
        return False

    def _lane(self, state: ModelState) -> Lane:
        lane = self._lanes[state.model] = Lane(self._parts, state)
        lane.start()
        return lane

    async def _check_previous(self, lane: Lane) -> None:
        """A base that patches are offered for must be what it is said to be."""
        release, slots = lane.state.previous, self._parts.slots
        if release is None:
            return
        if not await asyncio.to_thread(slots.verify, lane.state.model, release.slot, release.files, release.manifest):
            lane.feed(ev.SlotLost(at=self._parts.clock.now(), slot=release.slot))

    def _remembered(self) -> dict[ModelName, ModelState]:
        """What the journal knows of the models or, if it was lost, what the slots say."""
        states = self._parts.journal.load()
        if states or not self._parts.journal.begun_anew:
            return states
        adopted = adopt(self._parts)
        for state in adopted:
            self._parts.journal.save(state)
        logger.warning("found again in the slots: %s", ", ".join(state.model for state in adopted) or "nothing")
        return {state.model: state for state in adopted}

    def _sweep(self, states: list[ModelState], *, flushed_only: bool) -> None:
        named = {
            (state.model, release.slot)
            for state in states
            for release in (state.installed, state.candidate, state.previous)
            if release is not None
        }
        downloads = {name for state in states for name in wanted_downloads(state)}
        try:
            self._parts.slots.sweep(named, downloads, flushed_only=flushed_only)
            if self._parts.optimised:
                self._parts.optimised.sweep([state.model for state in states])
        except (FerryError, OSError) as error:  # what is left over waits for the next start; serving does not
            logger.warning("could not clear the data folder: %s", error)


def _in_service_first(state: ModelState) -> tuple[bool, str]:
    return serving(state) is None, state.model
