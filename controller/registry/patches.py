"""Patches, built in the background: the `pending` rows, those that serve most devices first, several at a time.

A row says that somebody wants a patch; this builder decides it: `ready`, `not_worth` (it would not save enough),
`failed`, or `skipped` (`patch_budget` says when), each with an event. Devices are told of a release once the patches
that could serve them are decided. What is transient (a full disk, a controller that stops) leaves the row pending.

Each patch is built by a process of its own (`patch_process`, `patch_worker`): it can be killed at any moment, gives its
memory back, has a limit of CPU time, and a crash of it is that patch's failure only. So every row that is not held up
by this machine is decided after a bounded time, and nobody waits for ever.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec.structs import replace
from opentelemetry import trace

from common.artifact.manifest import ArtifactRef
from common.backoff import Backoff
from common.clock import Clock
from common.delta import CODECS
from common.errors import FerryError, NotFound, StorageFull, Unavailable
from common.ids import Digest
from controller.registry.blobs import LocalBlobs
from controller.registry.patch_budget import MADE_ROOM, Budget, most_useful_first, no_room, skipped, why_not
from controller.registry.patch_facts import DataFile, data_file, room, spent_cpu_s, within_budget
from controller.registry.patch_process import run_worker
from controller.registry.patch_worker import Description, Order, Progress, Result
from controller.rollouts.patching import PatchKey
from controller.store.port import Event, Patch, Store, Transaction

WORTH_RATIO_MAX = 0.9
"""A patch larger than this part of the whole file is not worth its room on the disk and the device's work. A retrained
model takes about 82 %; a device rebuilds it faster than any link of an edge device brings the rest."""
INTERVAL_S = 5.0
"""How long new rows wait at most when nobody nudges."""
REVIEW_S = 60.0
"""How often patches that were skipped for a budget are looked at again."""
PROGRESS_INTERVAL_S = 1.0
PENDING_PER_LOOK_MAX = 10_000
RETRY = Backoff(base_s=5.0, cap_s=300.0)

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)


def request(tx: Transaction, base: Digest, target: Digest, codec: str, now: float) -> Patch:
    """The patch as it stands; pending if nobody has asked for it before, or if asking again may change the answer."""
    known = tx.patches.get(base, target, codec)
    if known is not None and not known.may_be_asked_again:
        return known
    fresh = Patch(base=base, target=target, codec=codec, state="pending", created_at=now)
    patch = known.to_be_built() if known else fresh
    tx.patches.put(patch)
    return patch


class PatchBuilder:
    """Builds what is pending until `stop`. `uniform` draws from [0, 1), to spread retries."""

    def __init__(
        self,
        store: Store,
        blobs: LocalBlobs,
        clock: Clock,
        budget: Budget,
        *,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._budget = budget
        self._uniform = uniform
        self._wanted = asyncio.Event()
        self._stopping = asyncio.Event()
        self._building: dict[PatchKey, asyncio.Task[None]] = {}
        self._holders: Counter[Digest] = Counter()
        self._count_again = True
        self._failures = 0
        self._review_at = 0.0

    def nudge(self) -> None:
        """There may be new rows, and devices that hold other files than before: look now."""
        self._count_again = True
        self._wanted.set()

    def stop(self) -> None:
        """Make `run` return soon; patches under way are dropped and stay pending."""
        self._stopping.set()

    async def run(self) -> None:
        """Build until `stop` or cancellation."""
        building = asyncio.create_task(self._build_for_ever())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({building, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if building.done():
                building.result()  # it only ends by an error, which is the caller's to hear
        finally:
            for task in (building, stopping):
                task.cancel()
            await asyncio.gather(building, stopping, return_exceptions=True)

    # The loop

    async def _build_for_ever(self) -> None:
        self._review_at = self._clock.monotonic()
        try:
            while True:
                self._wanted.clear()
                try:
                    self._hear_of_ended()
                    await self._review()
                    await self._fill()
                except (StorageFull, Unavailable) as error:
                    logger.warning("building patches must wait", extra={"reason": str(error)})
                    await asyncio.sleep(RETRY.delay_s(self._failures, self._uniform()))
                    self._failures += 1
                    self._count_again = True
                    continue
                await self._rest()
        finally:
            under_way = list(self._building.values())
            self._building.clear()
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def _hear_of_ended(self) -> None:
        """Forget the builds that have ended; what one of them raised is raised here."""
        for name, task in list(self._building.items()):
            if task.done():
                del self._building[name]
                task.result()
                self._failures = 0

    async def _rest(self) -> None:
        """Until a nudge, the end of a build, or the next tick."""
        try:
            async with asyncio.timeout(INTERVAL_S):  # before 3.12 `wait_for` can swallow the cancellation that ends us
                await self._wanted.wait()
        except TimeoutError:
            self._count_again = True

    async def _fill(self) -> None:
        """Decide at once what is not to be built, and give each worker that is free the most useful of the rest."""
        pending = await self._store.read(lambda tx: tx.patches.pending(PENDING_PER_LOOK_MAX))
        waiting = [patch for patch in pending if _name(patch) not in self._building]
        if not waiting:
            return
        holders = await self._count_holders()
        spent = await self._store.read(lambda tx: spent_cpu_s(tx, waiting))
        skips = {_name(patch): why_not(patch, holders, spent[patch.target], self._budget) for patch in waiting}
        await self._record(*(skipped(patch, skip) for patch in waiting if (skip := skips[_name(patch)])))
        wanted = [patch for patch in waiting if skips[_name(patch)] is None]
        threads = max(1, self._budget.workers // max(1, len(self._building) + len(wanted)))
        free = self._budget.workers - len(self._building)
        for patch in most_useful_first(wanted, holders)[:free]:
            task = asyncio.create_task(self._settle(patch, threads))
            task.add_done_callback(lambda _: self._wanted.set())
            self._building[_name(patch)] = task

    async def _count_holders(self) -> Counter[Digest]:
        """How many devices hold each file; counted once for all that a nudge or a tick has brought."""
        if self._count_again:
            self._count_again = False
            self._holders = await self._store.read(lambda tx: tx.devices.holders())
        return self._holders

    async def _review(self) -> None:
        """Now and then: remove what is over the budget, and build what the budget did not allow and now does."""
        if self._clock.monotonic() < self._review_at:
            return
        self._review_at = self._clock.monotonic() + REVIEW_S
        async with self._blobs.changing:
            excess = await self._store.read(lambda tx: room(tx, 0, None, self._budget.disk_bytes_max))
            await self._remove(excess or [])
        allowed = await self._store.read(lambda tx: within_budget(tx, self._budget))
        if allowed:
            await self._store.write(lambda tx: _put_all(tx, [patch.to_be_built() for patch in allowed]))

    # One patch

    async def _settle(self, patch: Patch, threads: int) -> None:
        """Build the patch and record what became of it, unless the trouble is transient: that is raised."""
        attributes = {"ferry.patch.base": patch.base, "ferry.patch.target": patch.target}
        out = self._blobs.incoming_path()
        with tracer.start_as_current_span("patch.build", attributes=attributes) as span:
            try:
                result, cpu_s = await run_worker(await self._order(patch, out, threads), self._teller(patch))
                span.set_attribute("ferry.patch.cpu_s", cpu_s)
                await self._decide(replace(patch, cpu_s=patch.cpu_s + cpu_s), result, out)
            except (StorageFull, Unavailable):
                raise
            except FerryError as error:
                await self._fail(patch, str(error))
            finally:
                out.unlink(missing_ok=True)

    async def _order(self, patch: Patch, out: Path, threads: int) -> Order:
        if patch.codec not in CODECS:
            raise NotFound(f"this controller does not make {patch.codec!r} patches")
        base, target = self._find(patch.base), self._find(patch.target)
        uses = await self._store.read(lambda tx: [data_file(tx, file) for file in (patch.base, patch.target)])
        base_described, target_described = map(self._description, uses)
        return Order(
            base=base,
            base_path=str(self._blobs.path(base.digest)),
            base_described=base_described,
            target=target,
            target_path=str(self._blobs.path(target.digest)),
            target_described=target_described,
            out=str(out),
            codec=patch.codec,
            bytes_max=int(WORTH_RATIO_MAX * target.size),
            cpu_s_max=self._budget.build_cpu_s_max,
            threads=threads,
        )

    def _description(self, use: DataFile | None) -> Description | None:
        path = self._blobs.path(use.model) if use else None
        return Description(str(path), use.name) if use and path else None

    def _find(self, digest: Digest) -> ArtifactRef:
        artifact = self._blobs.find(digest)
        if artifact is None:
            raise NotFound(f"the file {digest} is not here any more")
        return artifact

    def _teller(self, patch: Patch) -> Callable[[Progress], Awaitable[None]]:
        """Tells watchers how far the patch is, but not all the time."""
        told = self._clock.monotonic()

        async def tell(progress: Progress) -> None:
            nonlocal told
            if self._clock.monotonic() - told < PROGRESS_INTERVAL_S:
                return
            told = self._clock.monotonic()
            data: dict[str, object] = {"base": patch.base, "done": progress.done, "total": progress.total}
            event = Event(kind="patch.progress", subject=patch.target, at=self._clock.now(), data=data)
            await self._store.write(lambda tx: tx.journal.append_event(event))

        return tell

    async def _decide(self, patch: Patch, result: Result, out: Path) -> None:
        """A full disk passes; everything else is a verdict on this patch."""
        if result.code == StorageFull.code:
            raise StorageFull(result.reason)
        if result.patch is not None:
            await self._keep(patch, result.patch, out)
        elif result.state == "too_big":
            reason = f"it would be more than {WORTH_RATIO_MAX:.0%} of the whole file"
            await self._record(replace(patch, state="not_worth", reason=reason))
        else:
            await self._fail(patch, result.reason)

    async def _fail(self, patch: Patch, reason: str) -> None:
        about = {"ferry.patch.base": patch.base, "ferry.patch.target": patch.target, "reason": reason}
        logger.warning("a patch could not be built", extra=about)
        await self._record(replace(patch, state="failed", reason=reason))

    async def _keep(self, patch: Patch, made: ArtifactRef, out: Path) -> None:
        """Make the file a blob if there is room for it or less useful patches make some."""
        bytes_max = self._budget.disk_bytes_max
        async with self._blobs.changing:
            less_useful = await self._store.read(lambda tx: room(tx, made.size, patch, bytes_max))
            if less_useful is None:
                await self._record(skipped(replace(patch, needs_bytes=made.size), no_room(made.size, bytes_max)))
                return
            await self._remove(less_useful)
            await asyncio.to_thread(self._blobs.adopt, out, made)
            await self._record(replace(patch, state="ready", patch=made))

    async def _remove(self, patches: list[Patch]) -> None:
        """Take patches away, rows first: a crash in between leaves files that garbage collection finds."""
        if not patches:
            return
        now = self._clock.now()
        for digest in await self._store.write(lambda tx: _forget(tx, patches, now)):
            await asyncio.to_thread(self._blobs.remove, digest)

    async def _record(self, *patches: Patch) -> None:
        now = self._clock.now()

        def work(tx: Transaction) -> None:
            for patch in patches:
                tx.patches.put(patch)
                if patch.patch is not None:
                    tx.artifacts.put(patch.patch, now)
                tx.journal.append_event(_event(tx, patch, now))

        if patches:
            await self._store.write(work)


def _name(patch: Patch) -> PatchKey:
    return PatchKey(patch.base, patch.target, patch.codec)


def _put_all(tx: Transaction, patches: list[Patch]) -> None:
    for patch in patches:
        tx.patches.put(patch)


def _forget(tx: Transaction, patches: list[Patch], now: float) -> list[Digest]:
    """Skip these ready patches; the digests of those whose bytes nothing else needs."""
    gone = []
    for patch in patches:
        without = skipped(patch, MADE_ROOM)
        tx.patches.put(without)
        tx.journal.append_event(_event(tx, without, now))
        if patch.patch is not None and not tx.releases.by_artifact(patch.patch.digest):
            tx.artifacts.remove(patch.patch.digest)
            gone.append(patch.patch.digest)
    return gone


def _event(tx: Transaction, patch: Patch, now: float) -> Event:
    target = tx.artifacts.get(patch.target)
    data: dict[str, object] = {"base": patch.base, "codec": patch.codec, "full_size": target.size if target else 0}
    data["cpu_s"] = round(patch.cpu_s, 3)
    if patch.patch is not None:
        data["size"] = patch.patch.size
    if patch.reason:
        data["reason"] = patch.reason
    return Event(kind=f"patch.{patch.state}", subject=patch.target, at=now, data=data)
