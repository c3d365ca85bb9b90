"""Getting a release onto the device: manifest, bytes, slot. Each function ends in the event that tells how it went.

Whose fault a failure is decides its event: a patch or an index that is gone or wrong costs that offer only; wrong bytes
of a whole file, and a manifest that disagrees, speak against the release; everything else is transient. Nothing is
downloaded before the whole update is known to fit the order's budget.
"""

import asyncio
from collections.abc import Mapping

from msgspec import UNSET
from msgspec.structs import replace

from common.artifact import ArtifactRef, Variant
from common.delta import CODECS
from common.errors import FerryError, Forbidden, IntegrityFailure, InvalidInput, NotFound, StorageFull
from common.ids import Digest
from common.trust import ENVELOPE_BYTES_MAX
from common.wire import DesiredFile, DesiredModel, PartsOffer
from edge_agent.executor import filling
from edge_agent.executor.admission import admit
from edge_agent.executor.parts import Parts
from edge_agent.executor.ranges import Assembly, read_assembly
from edge_agent.executor.spending import Spending
from edge_agent.executor.threads import in_thread
from edge_agent.fetch import Ranges
from edge_agent.update import (
    FromFull,
    FromHeld,
    FromParts,
    FromPatches,
    Installed,
    ModelState,
    Slot,
    Source,
    Sources,
    agreed_variant,
    choose,
)
from edge_agent.update import events as ev
from edge_agent.update.choice import Local, Plan, TooDear, costliest, possible_downloads, ranges_name


class Acquisition:
    """The way from one order to a slot. It remembers the manifest between `fetch` and `build`, and nothing else."""

    def __init__(self, parts: Parts, target: DesiredModel) -> None:
        self.target = target
        self._parts = parts
        self._envelope = b""
        self._variant: Variant | None = None

    async def fetch(self, state: ModelState) -> ev.Event:
        """Choose, then the manifest: nothing else is worth fetching while order and manifest do not agree."""
        here = await asyncio.to_thread(self._here)
        spending = Spending(self.target, state.tally, here)
        plan = choose(self.target, self._local(state, here, spending.total))
        if isinstance(plan, TooDear):
            return ev.OverBudget(at=self._now(), needs=plan.needs, budget=plan.budget, spent=spending.tally())
        try:
            event = await self._fetch(state, plan, spending)
        except filling.Ended as end:
            event = end.event
        if isinstance(event, ev.WorkEnded):
            return replace(event, spent=spending.tally(costliest(plan.sources)))
        return event

    async def build(self, state: ModelState, sources: Sources, slot: Slot) -> ev.Event:
        """Make the slot complete; it is checked and on the disk when this ends in `Built`."""
        target, variant = self.target, self._variant
        if variant is None:
            raise AssertionError("built before it was fetched")
        work = filling.Filling(self._parts, state, target)
        try:
            await in_thread(lambda check: work.fill(sources, slot, self._envelope, check))
        except filling.Ended as end:
            return end.event
        except (FerryError, OSError) as error:
            return interrupted(error, self._now())
        candidate = Installed(
            slot=slot,
            version=target.version,
            variant=target.variant,
            files=variant.files,
            onnx_file=variant.model,
            manifest=target.manifest,
            inputs=variant.inputs,
            outputs=variant.outputs,
            self_test=variant.self_test,
            pipeline=variant.pipeline or UNSET,
            custom_ops=variant.custom_ops or UNSET,
            serving=variant.serving,
            reference=variant.reference,
        )
        return ev.Built(at=self._now(), candidate=candidate)

    async def _fetch(self, state: ModelState, plan: Plan, spending: Spending) -> ev.Event:
        """What the plan says. Raises `Ended` when an offer is of no use."""
        try:
            await self._fetch_manifest(state, spending)
            self._variant = variant = agreed_variant(self._envelope, self._parts.keys, self.target)
            await asyncio.to_thread(admit, variant, custom_ops=self._parts.custom_ops)
        except (IntegrityFailure, Forbidden) as error:
            return ev.ManifestRefused(at=self._now(), code=error.code, detail=str(error))
        except (FerryError, OSError) as error:
            return interrupted(error, self._now())
        try:
            await self._fetch_files(state, plan, spending)
        except IntegrityFailure as error:  # of a whole file: an offer's would have come as `Ended`
            return ev.Corrupted(at=self._now(), detail=str(error))
        except (FerryError, OSError) as error:
            return interrupted(error, self._now())
        return ev.Fetched(at=self._now(), sources=plan.sources)

    async def _fetch_files(self, state: ModelState, plan: Plan, spending: Spending) -> None:
        try:
            room = filling.room(self.target, plan.sources) + plan.bytes
            await asyncio.to_thread(self._parts.slots.make_room, room)
            for file, source in zip(self.target.files, plan.sources, strict=True):
                await self._fetch_file(state, file, source, spending)
        except StorageFull as error:
            if await asyncio.to_thread(self._clear_cache):
                raise  # and the next try finds the room
            previous = state.previous
            if previous is None or filling.needs(plan.sources, self.target, state.installed, previous):
                raise
            # Two releases must fit on the device, not three: the one before the installed one makes room.
            raise filling.Ended(ev.SlotLost(at=self._now(), slot=previous.slot)) from error

    async def _fetch_manifest(self, state: ModelState, spending: Spending) -> None:
        """The signed manifest, from a slot if one holds it."""
        target, slots = self.target, self._parts.slots
        if target.manifest.size > ENVELOPE_BYTES_MAX:
            raise IntegrityFailure(
                f"the manifest would be {target.manifest.size} bytes, the limit is {ENVELOPE_BYTES_MAX}"
            )
        for release in filling.releases(state):
            if release.manifest == target.manifest:
                self._envelope = await asyncio.to_thread(slots.manifest, target.model, release.slot)
                return
        await self._download(target.manifest, spending)
        self._envelope = await asyncio.to_thread(slots.download_path(target.manifest.digest).read_bytes)

    async def _fetch_file(self, state: ModelState, file: DesiredFile, source: Source, spending: Spending) -> None:
        match source:
            case FromHeld():
                pass
            case FromPatches(offers):
                for offer in offers:
                    with filling.blaming(offer.patch.digest, "patch", self._now(), NotFound, InvalidInput):
                        await self._download(offer.patch, spending)
            case FromParts(offer):
                with filling.blaming(offer.index.digest, "parts", self._now(), NotFound, InvalidInput):
                    await self._fetch_parts(state, file, offer, spending)
            case FromFull():
                await self._download(file.artifact, spending)

    async def _fetch_parts(self, state: ModelState, file: DesiredFile, offer: PartsOffer, spending: Spending) -> None:
        """Both indexes, then the ranges in which the file differs from the base. The offer said how many bytes."""
        await self._download(offer.index, spending)
        await self._download(offer.base_index, spending)
        _, base = filling.holder(state, offer.base)
        assembly: Assembly = await asyncio.to_thread(read_assembly, self._parts.slots, file.artifact, base, offer)
        if assembly.bytes > offer.bytes:
            raise IntegrityFailure(f"{assembly.bytes} bytes are missing, the offer said {offer.bytes}")
        await self._download(file.artifact, spending, ranges_name(offer), assembly.ranges)

    async def _download(
        self, ref: ArtifactRef, spending: Spending, name: Digest | None = None, ranges: Ranges | None = None
    ) -> None:
        name = name or ref.digest
        destination = self._parts.slots.download_path(name)
        # The plan fits; but a download that turns out damaged is begun again, and that may not fit.
        transfer = await self._parts.fetcher.fetch(ref, destination, spending.meter(name), ranges, spending.left)
        spending.finished(name, transfer)

    def _clear_cache(self) -> bool:
        return self._parts.optimised is not None and self._parts.optimised.clear()

    def _here(self) -> dict[Digest, int]:
        """In a thread: how much of each download is on the disk."""
        sizes = possible_downloads(self.target)
        found = {name: self._parts.slots.downloaded_bytes(ArtifactRef(name, size)) for name, size in sizes.items()}
        return {name: min(size, sizes[name]) for name, size in found.items() if size}

    def _local(self, state: ModelState, here: Mapping[Digest, int], spent: int) -> Local:
        releases = filling.releases(state)
        held = {ref.digest for release in releases for ref in (*release.files.values(), release.manifest)}
        return Local(frozenset(held), CODECS, here, spent, frozenset(state.refused))

    def _now(self) -> float:
        return self._parts.clock.now()


def interrupted(error: FerryError | OSError, at: float) -> ev.Interrupted:
    """The event for trouble that is nobody's verdict."""
    code = error.code if isinstance(error, FerryError) else "io_error"
    return ev.Interrupted(at=at, code=code, detail=str(error))
