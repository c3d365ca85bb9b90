"""Making a release's files in a slot, each from its source, and saying whose fault it is when that does not go.

Everything here blocks and runs in a thread. A chain of patches writes the files on its way beside the downloads and
removes them again; a kill leaves them to the sweep of the next start, and they are made again.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from common import delta
from common.artifact import ArtifactRef
from common.errors import FerryError, IntegrityFailure, InvalidInput
from common.filesource import FileSource
from common.ids import Digest
from common.wire import DesiredFile, DesiredModel, PartsOffer, PatchOffer
from edge_agent.executor.parts import Parts
from edge_agent.executor.ranges import read_assembly
from edge_agent.slots import NewSlot, Sink, copy_into
from edge_agent.update import FromFull, FromHeld, FromParts, FromPatches, Installed, ModelState, Slot, Source, Sources
from edge_agent.update import events as ev
from edge_agent.update.choice import ranges_name


class Ended(Exception):
    """The work is over, and how is `event`."""

    def __init__(self, event: ev.Event) -> None:
        super().__init__(event)
        self.event = event


@contextlib.contextmanager
def blaming(offer: Digest, what: str, at: float, *others: type[FerryError]) -> Iterator[None]:
    """An `IntegrityFailure` (or one of `others`) in the block speaks against `offer` and ends the work."""
    try:
        yield
    except FerryError as error:
        if not isinstance(error, (IntegrityFailure, *others)):
            raise
        raise Ended(ev.OfferUnusable(at=at, offer=offer, detail=f"{what} not used: {error}")) from error


class Filling:
    """Fills one slot for one order."""

    def __init__(self, parts: Parts, state: ModelState, target: DesiredModel) -> None:
        self._slots = parts.slots
        self._now = parts.clock.now
        self._state = state
        self._target = target

    def fill(self, sources: Sources, slot: Slot, envelope: bytes, check: Callable[[], None]) -> None:
        """Write the slot; `check` raises when the result is not wanted any more.

        Raises `Ended` when the bytes of a source are wrong, and what the disk raises.
        """
        made: dict[Digest, Path] = {}
        with self._slots.replacing(self._target.model, slot, envelope) as new:
            for file, source in zip(self._target.files, sources, strict=True):
                if (twin := made.get(file.artifact.digest)) is not None:
                    new.write(file.name, file.artifact, partial(copy_into, twin))
                else:
                    self._fill(new, file, source, check)
                    made[file.artifact.digest] = new.path(file.name)

    def _fill(self, new: NewSlot, file: DesiredFile, source: Source, check: Callable[[], None]) -> None:
        def write(fill: Callable[[Sink], object]) -> None:
            new.write(file.name, file.artifact, _while_wanted(fill, check))

        match source:
            case FromHeld():
                release, _ = holder(self._state, file.artifact.digest)
                try:
                    write(lambda sink: copy_into(self._path(file.artifact.digest), sink))
                except IntegrityFailure as error:
                    raise Ended(ev.SlotLost(at=self._now(), slot=release.slot)) from error
            case FromPatches(offers):
                self._chain(offers, file.artifact, write, check)
            case FromParts(offer):
                with blaming(offer.index.digest, "parts", self._now()):
                    write(lambda sink: self._assemble(offer, file.artifact, sink))
            case FromFull():
                try:
                    new.take(file.name, file.artifact, self._slots.download_path(file.artifact.digest))
                except IntegrityFailure as error:
                    self._slots.drop(file.artifact.digest)
                    raise Ended(ev.Corrupted(at=self._now(), detail=str(error))) from error

    def _chain(
        self,
        offers: tuple[PatchOffer, ...],
        target: ArtifactRef,
        write: Callable[[Callable[[Sink], object]], None],
        check: Callable[[], None],
    ) -> None:
        """Apply the patches one after another, over files that are removed again at the end."""
        *way, last = offers
        with contextlib.ExitStack() as made:
            base = self._path(offers[0].base)
            for offer in way:
                with blaming(offer.patch.digest, "patch", self._now(), InvalidInput):
                    fill = _while_wanted(self._applied(base, offer, offer.target), check)
                    base = made.enter_context(self._slots.intermediate(offer.target, fill))
            with blaming(last.patch.digest, "patch", self._now(), InvalidInput):
                write(self._applied(base, last, target))

    def _applied(self, base: Path, offer: PatchOffer, target: ArtifactRef) -> Callable[[Sink], object]:
        def fill(sink: Sink) -> None:
            with FileSource(base) as old, FileSource(self._slots.download_path(offer.patch.digest)) as patch:
                delta.apply(old, patch, sink, target=target)

        return fill

    def _assemble(self, offer: PartsOffer, target: ArtifactRef, sink: Sink) -> None:
        _, base = holder(self._state, offer.base)
        assembly = read_assembly(self._slots, target, base, offer)
        with FileSource(self._path(offer.base)) as old:
            assembly.write(old, self._slots.download_path(ranges_name(offer)), sink)

    def _path(self, digest: Digest) -> Path:
        """The file in a slot of this model that has the digest."""
        release, _ = holder(self._state, digest)
        return self._slots.path(self._target.model, release.slot, release.name_of(digest) or "")


def room(target: DesiredModel, sources: Sources) -> int:
    """Bytes that filling the slot writes beside the downloads; a whole file is its download under another name."""
    made = [file.artifact.size for file, source in zip(target.files, sources, strict=True) if source != FromFull()]
    chains = [
        sum(offer.target.size for offer in source.offers[:-1]) for source in sources if isinstance(source, FromPatches)
    ]
    return sum(made) + max(chains, default=0)


def releases(state: ModelState) -> tuple[Installed, ...]:
    """The releases that an update can be made from."""
    return tuple(release for release in (state.installed, state.previous) if release is not None)


def holder(state: ModelState, digest: Digest) -> tuple[Installed, ArtifactRef]:
    """The release that has the file, and the file; the source was chosen because there is one."""
    for release in releases(state):
        if (name := release.name_of(digest)) is not None:
            return release, release.files[name]
    raise IntegrityFailure(f"no slot holds {digest} any more")


def needs(sources: Sources, target: DesiredModel, installed: Installed | None, previous: Installed) -> bool:
    """Whether the update is made from something that only `previous` has."""
    bases: set[Digest] = set()
    for file, source in zip(target.files, sources, strict=True):
        match source:
            case FromHeld():
                bases.add(file.artifact.digest)
            case FromPatches(offers):
                bases.add(offers[0].base)
            case FromParts(offer):
                bases.add(offer.base)
            case FromFull():
                pass
    return any(previous.name_of(base) and not (installed and installed.name_of(base)) for base in bases)


def _while_wanted(fill: Callable[[Sink], object], check: Callable[[], None]) -> Callable[[Sink], object]:
    """`fill`, until `check` raises."""

    def checked_fill(sink: Sink) -> None:
        def checked(block: bytes) -> None:
            check()
            sink(block)

        fill(checked)

    return checked_fill
