"""Getting a release onto the device: manifest, bytes, slot. Each function ends in the event that tells how it went.

Whose fault a failure is decides its event: wrong bytes of a patch or a patch that is gone cost the patch only; wrong
bytes of the whole artifact, and a manifest that disagrees, speak against the release; everything else is transient.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from common import delta
from common.artifact import ArtifactRef, Variant
from common.errors import FerryError, IntegrityFailure, InvalidInput, NotFound, StorageFull
from common.filesource import FileSource
from common.ids import Digest
from common.trust import ENVELOPE_BYTES_MAX
from common.wire import DesiredModel, Strategy
from edge_agent.executor.parts import Parts
from edge_agent.slots import Sink, copy_into
from edge_agent.update import FromFull, FromHeld, FromPatch, Installed, ModelState, Slot, Source, Tally, agreed_variant
from edge_agent.update import events as ev
from edge_agent.update.state import same_release

T = TypeVar("T")


class Superseded(Exception):
    """The work in a thread is not wanted any more."""


class Acquisition:
    """One update's way from order to slot.

    `counted` are the downloads whose cost was already told; the bytes of an earlier try count when the download that
    they belong to is finished.
    """

    def __init__(self, parts: Parts, target: DesiredModel) -> None:
        self._parts = parts
        self._target = target
        self._counted: set[Digest] = set()
        self._envelope = b""
        self._variant: Variant | None = None

    def is_for(self, target: DesiredModel) -> bool:
        """Whether this is the way to `target`."""
        return same_release(self._target, target)

    async def fetch(self, state: ModelState, source: Source) -> ev.Event:
        """Manifest first: nothing else is worth fetching while order and manifest do not agree."""
        spent = Tally(strategy=_strategy(source))
        try:
            spent = spent.plus(await self._fetch_manifest(state))
            self._variant = agreed_variant(self._envelope, self._parts.keys, self._target)
        except IntegrityFailure as error:
            return ev.ManifestRefused(at=self._now(), code=error.code, detail=str(error), spent=spent)
        except (FerryError, OSError) as error:
            return interrupted(error, self._now(), spent)
        try:
            await asyncio.to_thread(self._parts.slots.make_room, self._room(source))
            spent = spent.plus(await self._fetch_bytes(source))
        except (FerryError, OSError) as error:
            return self._failed_fetch(state, source, error, spent)
        return ev.Fetched(at=self._now(), source=source, spent=spent)

    async def build(self, state: ModelState, source: Source, slot: Slot) -> ev.Event:
        """Make the slot complete; it is checked and on the disk when this ends in `Built`."""
        if self._variant is None:
            raise AssertionError("built before it was fetched")
        try:
            await _in_thread(lambda check: self._fill(state, source, slot, check))
        except (IntegrityFailure, InvalidInput) as error:
            return self._wrong_bytes(state, source, error, Tally())
        except (FerryError, OSError) as error:
            return interrupted(error, self._now(), Tally())
        target, variant = self._target, self._variant
        candidate = Installed(
            slot=slot,
            version=target.version,
            variant=target.variant,
            artifact=target.artifact,
            manifest=target.manifest,
            inputs=variant.inputs,
            outputs=variant.outputs,
        )
        return ev.Built(at=self._now(), candidate=candidate)

    async def _fetch_manifest(self, state: ModelState) -> Tally:
        """The signed manifest, from a slot if one holds it."""
        target, slots = self._target, self._parts.slots
        if target.manifest.size > ENVELOPE_BYTES_MAX:
            raise IntegrityFailure(
                f"the manifest would be {target.manifest.size} bytes, the limit is {ENVELOPE_BYTES_MAX}"
            )
        for release in (state.installed, state.previous):
            if release is not None and release.manifest == target.manifest:
                self._envelope = await asyncio.to_thread(slots.manifest, target.model, release.slot)
                return Tally()
        cost = await self._download(target.manifest)
        self._envelope = await asyncio.to_thread(slots.download_path(target.manifest.digest).read_bytes)
        return cost

    async def _fetch_bytes(self, source: Source) -> Tally:
        match source:
            case FromHeld():
                return Tally()
            case FromPatch(offer):
                return await self._download(offer.patch)
            case FromFull():
                return await self._download(self._target.artifact)

    async def _download(self, ref: ArtifactRef) -> Tally:
        transfer = await self._parts.fetcher.fetch(ref, self._parts.slots.download_path(ref.digest))
        if ref.digest in self._counted:
            return Tally()
        self._counted.add(ref.digest)
        moved = transfer.bytes + transfer.resumed_bytes
        return Tally(transport=transfer.transport, bytes_transferred=moved, resumed_bytes=transfer.resumed_bytes)

    def _room(self, source: Source) -> int:
        """Bytes that this update will still write."""
        artifact, downloaded = self._target.artifact, self._parts.slots.downloaded_bytes
        match source:
            case FromHeld():
                return artifact.size
            case FromPatch(offer):
                return artifact.size + max(0, offer.patch.size - downloaded(offer.patch))
            case FromFull():
                return max(0, artifact.size - downloaded(artifact))

    def _failed_fetch(self, state: ModelState, source: Source, error: FerryError | OSError, spent: Tally) -> ev.Event:
        if isinstance(error, IntegrityFailure):
            return self._wrong_bytes(state, source, error, spent)
        if (
            isinstance(error, StorageFull)
            and state.previous is not None
            and not _needs(source, state.previous, self._target)
        ):
            # Two releases must fit on the device, not three: the one before the installed one makes room.
            self._counted.clear()
            return ev.SlotLost(at=self._now(), slot=state.previous.slot)
        if isinstance(source, FromPatch) and isinstance(error, (NotFound, InvalidInput)):
            return ev.PatchUnusable(at=self._now(), detail=str(error), spent=spent)
        return interrupted(error, self._now(), spent)

    def _wrong_bytes(self, state: ModelState, source: Source, error: FerryError, spent: Tally) -> ev.Event:
        match source:
            case FromHeld():
                return ev.SlotLost(at=self._now(), slot=_holder(state, self._target.artifact.digest).slot)
            case FromPatch():
                return ev.PatchUnusable(at=self._now(), detail=str(error), spent=spent)
            case FromFull():
                self._counted.discard(self._target.artifact.digest)
                return ev.Corrupted(at=self._now(), detail=str(error), spent=spent)

    def _fill(self, state: ModelState, source: Source, slot: Slot, check: Callable[[], None]) -> None:
        """In a thread: write the slot; `check` raises when the result is not wanted any more."""
        slots, target = self._parts.slots, self._target

        def write(fill: Callable[[Sink], object]) -> None:
            def fill_while_wanted(sink: Sink) -> None:
                def checked(block: bytes) -> None:
                    check()
                    sink(block)

                fill(checked)

            slots.write(target.model, slot, target.artifact, self._envelope, fill_while_wanted)

        match source:
            case FromHeld():
                held = slots.model_path(target.model, _holder(state, target.artifact.digest).slot)
                write(lambda sink: copy_into(held, sink))
            case FromPatch(offer):
                base = slots.model_path(target.model, _holder(state, offer.base).slot)
                with FileSource(base) as old, FileSource(slots.download_path(offer.patch.digest)) as patch:
                    write(lambda sink: delta.apply(old, patch, sink, target=target.artifact))
            case FromFull():
                slots.move_in(target.model, slot, target.artifact, self._envelope)

    def _now(self) -> float:
        return self._parts.clock.now()


def interrupted(error: FerryError | OSError, at: float, spent: Tally) -> ev.Interrupted:
    """The event for trouble that is nobody's verdict."""
    code = error.code if isinstance(error, FerryError) else "io_error"
    return ev.Interrupted(at=at, code=code, detail=str(error), spent=spent)


def _strategy(source: Source) -> Strategy:
    match source:
        case FromHeld():
            return "none"
        case FromPatch():
            return "delta"
        case FromFull():
            return "full"


def _needs(source: Source, release: Installed, target: DesiredModel) -> bool:
    """Whether the update is made from `release`."""
    match source:
        case FromHeld():
            return release.artifact == target.artifact
        case FromPatch(offer):
            return release.artifact.digest == offer.base
        case FromFull():
            return False


def _holder(state: ModelState, digest: Digest) -> Installed:
    """The release whose slot holds the artifact; the source was chosen because there is one."""
    for release in (state.installed, state.previous):
        if release is not None and release.artifact.digest == digest:
            return release
    raise IntegrityFailure(f"no slot holds {digest} any more")


async def _in_thread(work: Callable[[Callable[[], None]], T]) -> T:
    """`work`'s result from a thread. On cancellation the thread is told, and has ended when this returns."""
    unwanted = threading.Event()

    def check() -> None:
        if unwanted.is_set():
            raise Superseded

    running = asyncio.ensure_future(asyncio.to_thread(work, check))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        unwanted.set()
        await asyncio.gather(running, return_exceptions=True)
        raise
