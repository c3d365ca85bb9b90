"""Patches, built in the background: one `pending` row at a time, oldest first.

A row says that somebody wants a patch; this builder turns it into `ready`, `not_worth` (it would not save enough) or
`failed`, each with an event, and devices are told of a release once that is known. What is transient (a full disk, a
controller that stops) leaves the row pending. Each patch is built by a process of its own (`patch_worker`): it can be
killed at any moment, gives its memory back, and a crash of it is that patch's failure only.
"""

import asyncio
import contextlib
import logging
import random
import sys
from asyncio import StreamReader
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable

import msgspec
from opentelemetry import trace

from common.artifact.manifest import ArtifactRef
from common.backoff import Backoff
from common.clock import Clock
from common.delta import CODECS
from common.errors import FerryError, IntegrityFailure, NotFound, StorageFull, Unavailable
from common.ids import Digest
from controller.registry.blobs import LocalBlobs
from controller.registry.patch_worker import Order, Progress, Result
from controller.store.port import Event, Patch, Store, Transaction

WORTH_RATIO_MAX = 0.6
"""A patch larger than this part of the whole file is not worth sending: the device would work more to save little."""
INTERVAL_S = 5.0
"""How long new rows wait at most when nobody nudges."""
BUILD_S_MAX = 1800.0
PROGRESS_INTERVAL_S = 1.0
COMPLAINT_BYTES_MAX = 4096
"""How much of what a broken worker said last is logged."""
RETRY = Backoff(base_s=5.0, cap_s=300.0)

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)


class Wanted(msgspec.Struct, frozen=True, order=True):
    """The name of a patch."""

    base: Digest
    target: Digest
    codec: str


def request(tx: Transaction, base: Digest, target: Digest, codec: str, now: float) -> Patch:
    """The patch as it stands; a new, pending one if nobody has asked for it before."""
    patch = tx.patches.get(base, target, codec)
    if patch is None:
        patch = Patch(base=base, target=target, codec=codec, state="pending", created_at=now)
        tx.patches.put(patch)
    return patch


class PatchBuilder:
    """Builds what is pending until `stop`. `uniform` draws from [0, 1), to spread retries."""

    def __init__(
        self, store: Store, blobs: LocalBlobs, clock: Clock, *, uniform: Callable[[], float] = random.random
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._uniform = uniform
        self._wanted = asyncio.Event()
        self._stopping = asyncio.Event()

    def nudge(self) -> None:
        """There may be new rows: look now."""
        self._wanted.set()

    def stop(self) -> None:
        """Make `run` return soon; a patch under way is dropped and stays pending."""
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

    async def _build_for_ever(self) -> None:
        failures = 0
        while True:
            self._wanted.clear()
            try:
                while pending := await self._store.read(lambda tx: tx.patches.pending(1)):
                    await self._settle(pending[0])
                    failures = 0
            except (StorageFull, Unavailable) as error:
                logger.warning("building patches must wait", extra={"reason": str(error)})
                await asyncio.sleep(RETRY.delay_s(failures, self._uniform()))
                failures += 1
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    INTERVAL_S
                ):  # before 3.12 `wait_for` can swallow the cancellation that ends us
                    await self._wanted.wait()

    async def _settle(self, patch: Patch) -> None:
        """Build the patch and record what became of it, unless the trouble is transient: that is raised."""
        attributes = {"ferry.patch.base": patch.base, "ferry.patch.target": patch.target}
        with tracer.start_as_current_span("patch.build", attributes=attributes):
            try:
                await self._build(patch)
            except (StorageFull, Unavailable):
                raise
            except FerryError as error:
                reason = str(error)
                logger.warning("a patch could not be built", extra={**attributes, "reason": reason})
                await self._record(msgspec.structs.replace(patch, state="failed", reason=reason), self._size(patch))

    async def _build(self, patch: Patch) -> None:
        if patch.codec != CODECS[0]:
            raise NotFound(f"this controller does not make {patch.codec!r} patches")
        base, target = self._find(patch.base), self._find(patch.target)
        out = self._blobs.incoming_path()
        try:
            order = Order(
                base=base,
                base_path=str(self._blobs.path(base.digest)),
                target=target,
                target_path=str(self._blobs.path(target.digest)),
                out=str(out),
                bytes_max=int(WORTH_RATIO_MAX * target.size),
            )
            result = await self._in_worker(order)
            if result.state == "failed":
                raise _error_of(result)
            async with self._blobs.changing:
                if result.patch is not None:
                    await asyncio.to_thread(self._blobs.adopt, out, result.patch)
                await self._record(_settled(patch, result), target.size)
        finally:
            out.unlink(missing_ok=True)

    def _find(self, digest: Digest) -> ArtifactRef:
        artifact = self._blobs.find(digest)
        if artifact is None:
            raise NotFound(f"the file {digest} is not here any more")
        return artifact

    def _size(self, patch: Patch) -> int:
        target = self._blobs.find(patch.target)
        return target.size if target else 0

    async def _record(self, patch: Patch, full_size: int) -> None:
        now = self._clock.now()

        def work(tx: Transaction) -> None:
            tx.patches.put(patch)
            if patch.patch is not None:
                tx.artifacts.put(patch.patch, now)
            tx.journal.append_event(_event(patch, full_size, now))

        await self._store.write(work)

    async def _in_worker(self, order: Order) -> Result:
        """Run the worker to its end, telling watchers how far it is; it never outlives this call."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "controller.registry.patch_worker", msgspec.json.encode(order),
            stdin=PIPE, stdout=PIPE, stderr=PIPE,
        )  # fmt: skip
        stdout, stderr = _pipes(process)
        complaint = asyncio.create_task(_last_words(stderr))
        try:
            async with asyncio.timeout(BUILD_S_MAX):
                result = await self._follow(stdout, order)
                await process.wait()
        except TimeoutError as error:
            raise IntegrityFailure(f"building took longer than {BUILD_S_MAX:.0f} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            words = await complaint
        if result is None or process.returncode != 0:
            logger.error("the patch worker broke", extra={"status": process.returncode, "said": words})
            return Result("failed", reason=f"the worker broke with status {process.returncode}")
        return result

    async def _follow(self, stdout: StreamReader, order: Order) -> Result | None:
        told = self._clock.monotonic()
        async for line in _lines(stdout):
            if isinstance(line, Result):
                return line
            if self._clock.monotonic() - told >= PROGRESS_INTERVAL_S:
                told = self._clock.monotonic()
                await self._tell_progress(order, line)
        return None

    async def _tell_progress(self, order: Order, progress: Progress) -> None:
        event = Event(
            kind="patch.progress",
            subject=order.target.digest,
            at=self._clock.now(),
            data={"base": order.base.digest, "done": progress.done, "total": progress.total},
        )
        await self._store.write(lambda tx: tx.journal.append_event(event))


def _pipes(process: Process) -> tuple[StreamReader, StreamReader]:
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("the patch worker was started without pipes")
    return process.stdout, process.stderr


async def _lines(stdout: StreamReader) -> AsyncIterator[Progress | Result]:
    try:
        async for line in stdout:
            yield msgspec.json.decode(line, type=Progress | Result)
    except (msgspec.DecodeError, ValueError) as error:
        raise IntegrityFailure(f"the patch worker said something that is not ours: {error}") from error


async def _last_words(stderr: StreamReader) -> str:
    """What the process wrote to its standard error; only the end of it is kept."""
    words = b""
    while piece := await stderr.read(COMPLAINT_BYTES_MAX):
        words = (words + piece)[-COMPLAINT_BYTES_MAX:]
    return words.decode(errors="replace")


def _error_of(result: Result) -> FerryError:
    """A full disk passes; everything else is a verdict on this patch."""
    if result.code == StorageFull.code:
        return StorageFull(result.reason)
    return IntegrityFailure(result.reason)


def _settled(patch: Patch, result: Result) -> Patch:
    if result.patch is not None:
        return msgspec.structs.replace(patch, state="ready", patch=result.patch)
    reason = f"it would be more than {WORTH_RATIO_MAX:.0%} of the whole file"
    return msgspec.structs.replace(patch, state="not_worth", reason=reason)


def _event(patch: Patch, full_size: int, now: float) -> Event:
    data: dict[str, object] = {"base": patch.base, "codec": patch.codec, "full_size": full_size}
    if patch.patch is not None:
        data["size"] = patch.patch.size
    if patch.reason:
        data["reason"] = patch.reason
    return Event(kind=f"patch.{patch.state}", subject=patch.target, at=now, data=data)
