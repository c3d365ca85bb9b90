"""Looking now and again whether the files in the slots are still what they were, and mending those that are not.

Disks forget. A release that serves is in memory, so nobody would notice before the next start, when it is needed most.
Every `scrub_interval_s` all files of installed and previous releases are read, at the lowest priority and no faster
than `scrub_bytes_per_s`; from the disk, not from the page cache, unless an engine has them mapped, and then what it
sees is what matters. A file that is not what its digest says is replaced by the same file from the other slot, or it
is fetched again. Until that has worked the device says so in its report. Optimised graphs are read too; they are made
again from the slot.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from common.artifact import ArtifactRef, Hasher, hex_of
from common.errors import FerryError
from edge_agent.executor.lane import Lane
from edge_agent.executor.parts import Parts
from edge_agent.inference.niced import run_niced
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.slots import BLOCK_BYTES, is_damage
from edge_agent.update import MANIFEST_FILE, Slot, Stage
from edge_agent.update import events as ev

logger = logging.getLogger(__name__)


SETTLED: Final = frozenset({Stage.IDLE, Stage.FAILED})
"""Stages in which no update is under way."""


class Named(NamedTuple):
    """A file that the journal names."""

    slot: Slot
    name: str
    ref: ArtifactRef


class Scrub:
    """Looks after the slots of all `lanes`."""

    def __init__(self, parts: Parts, lanes: Callable[[], list[Lane]]) -> None:
        self._parts = parts
        self._lanes = lanes
        self._stopped = threading.Event()

    async def run(self) -> None:
        """Look every so often, for ever."""
        interval_s = self._parts.limits.scrub_interval_s
        while interval_s:
            await asyncio.sleep(interval_s)
            try:
                await self.look()
            except OSError as error:
                logger.warning("could not look after the slots: %s", error)

    def stop(self) -> None:
        """End a look that is under way."""
        self._stopped.set()

    async def look(self) -> None:
        """Read everything once and mend what is bad."""
        for lane in self._lanes():
            named = list(_named(lane))
            bad = [one for one in named if not await self._is_sound(lane, self._path(lane, one), one.ref)]
            for one in bad:
                if _is_settled(lane, one):
                    await self._mend(lane, one)
            if self._parts.optimised:
                await self._look_at_optimised(lane, self._parts.optimised)

    async def _is_sound(self, lane: Lane, path: Path, ref: ArtifactRef) -> bool:
        return await run_niced(lambda: self._read(path, ref), f"scrub-{lane.state.model}")

    async def _look_at_optimised(self, lane: Lane, cache: OptimisedModels) -> None:
        """A graph that went bad goes; the release whose session has it mapped is loaded again, and makes a new one."""
        model = lane.state.model
        for file in await asyncio.to_thread(cache.kept, model):
            if await self._is_sound(lane, file.path, file.ref):
                continue
            if lane.state.stage not in SETTLED or not file.path.exists():
                continue  # an update tries it, or has removed it: the next look is early enough
            logger.warning("an optimised model went bad on the disk", extra={"model": model, "file": str(file.path)})
            self._parts.findings.bad()
            await asyncio.to_thread(cache.drop, file)
            self._parts.findings.mended()
            installed = lane.state.installed
            if installed is not None and hex_of(installed.identity) == file.release:
                lane.feed(ev.Mended(at=self._parts.clock.now(), slot=installed.slot))

    async def _mend(self, lane: Lane, named: Named) -> None:
        model, slots = lane.state.model, self._parts.slots
        extra = {"model": model, "slot": named.slot, "file": named.name}
        logger.warning("a file went bad on the disk", extra=extra)
        self._parts.findings.bad()
        lane.remark(f"{named.name} in slot {named.slot} went bad on the disk; mending it")
        source, fetched = self._other(lane, named), None
        try:
            if source is None:
                source = fetched = slots.download_path(named.ref.digest)
                await self._parts.fetcher.fetch(named.ref, source)
            await asyncio.to_thread(
                slots.mend,
                model,
                named.slot,
                named.name,
                named.ref,
                source=source,
                still=lambda: _is_settled(lane, named),
            )
        except (FerryError, OSError) as error:
            lane.remark(f"{named.name} in slot {named.slot} went bad on the disk and cannot be mended yet: {error}")
            return
        if fetched is not None and not lane.wants(named.ref.digest):
            await asyncio.to_thread(slots.drop, named.ref.digest)
        logger.warning("a file that went bad was mended", extra=extra)
        self._parts.findings.mended()
        lane.remark("")
        lane.feed(ev.Mended(at=self._parts.clock.now(), slot=named.slot))

    def _other(self, lane: Lane, named: Named) -> Path | None:
        """The same file in the other slot; whether it is sound is seen as it is copied."""
        others = (one for one in _named(lane) if one.slot != named.slot and one.ref == named.ref)
        return next((path for one in others if (path := self._path(lane, one)).exists()), None)

    def _path(self, lane: Lane, named: Named) -> Path:
        return self._parts.slots.file(lane.state.model, named.slot, named.name)

    def _read(self, path: Path, ref: ArtifactRef) -> bool:
        """Whether the file is what it was; true when the look was ended before that was known."""
        hasher, rate = Hasher(), self._parts.limits.scrub_bytes_per_s
        try:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while block := file.read(BLOCK_BYTES):
                    hasher.update(block)
                    if self._stopped.wait(len(block) / rate):
                        return True
        except OSError as error:
            if not is_damage(error):
                raise
            logger.warning("cannot read %s: %s", path, error)
            return False
        return (hasher.digest(), hasher.size) == (ref.digest, ref.size)


def _is_settled(lane: Lane, named: Named) -> bool:
    """Whether the journal still names the file, and no update is writing that slot."""
    installed, stage = lane.state.installed, lane.state.stage
    untouched = stage in SETTLED or (installed is not None and installed.slot == named.slot)
    return untouched and named in set(_named(lane))


def _named(lane: Lane) -> Iterator[Named]:
    state = lane.state
    for release in (state.installed, state.previous):
        if release is not None:
            for name, ref in {**release.files, MANIFEST_FILE: release.manifest}.items():
                yield Named(release.slot, name, ref)
