"""What the tests of patches do with a registry: let devices hold files, ask for patches, wait for what comes of it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import psutil

from common.artifact.manifest import ArtifactRef
from common.delta import CODECS
from common.ids import DeviceId
from common.wire import ReportedState
from controller.devices import Device
from controller.registry import patch_worker, patches
from controller.registry.patch_budget import Budget
from controller.registry.patches import PatchBuilder
from controller.store.port import Patch, Transaction
from tests.integration.registry_bench import Bench

WITHIN_S = 60.0
PLENTY = Budget(workers=2, cpu_s_per_release=3600.0, build_cpu_s_max=600, disk_bytes_max=2**40)


@contextlib.asynccontextmanager
async def building(bench: Bench, **budget: Any) -> AsyncIterator[PatchBuilder]:
    allowed = msgspec.structs.replace(PLENTY, **budget)
    builder = PatchBuilder(bench.store, bench.blobs, bench.clock, allowed, uniform=lambda: 0.0)
    running = asyncio.create_task(builder.run())
    yield builder
    builder.stop()
    await running


async def ask(
    bench: Bench, base: ArtifactRef, target: ArtifactRef, codec: str = CODECS[0], *, holders: int = 1
) -> Patch:
    """Ask for the patch, with so many devices that hold the base and nothing else."""
    await hold(bench, base, holders)
    now = bench.clock.now()
    return await bench.store.write(lambda tx: patches.request(tx, base.digest, target.digest, codec, now))


async def hold(bench: Bench, base: ArtifactRef, holders: int) -> None:
    """Let exactly `holders` devices hold `base`: these devices, and no other file."""

    def work(tx: Transaction) -> None:
        before = [device for device in tx.devices.all() if device.id.startswith(base.digest[-8:])]
        for number in range(max(holders, len(before))):
            name = DeviceId(f"{base.digest[-8:]}-{number}")
            held = (base.digest,) if number < holders else ()
            said = ReportedState(device=name, epoch=1, seq=1, sent_at=1.0, generation=1, held=held)
            tx.devices.put(Device(id=name, created_at=1.0, reported=said))

    await bench.store.write(work)


async def patch_of(bench: Bench, base: ArtifactRef, target: ArtifactRef, codec: str = CODECS[0]) -> Patch:
    patch = await bench.store.read(lambda tx: tx.patches.get(base.digest, target.digest, codec))
    assert patch is not None
    return patch


async def settled(bench: Bench, base: ArtifactRef, target: ArtifactRef, codec: str = CODECS[0]) -> Patch:
    """The patch once it is no longer pending."""

    async def done() -> bool:
        return (await patch_of(bench, base, target, codec)).state != "pending"

    await until(done, "the patch is settled")
    return await patch_of(bench, base, target, codec)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not await condition():
        assert time.monotonic() < deadline, f"did not happen within {WITHIN_S} s: {what}"
        await asyncio.sleep(0.01)


def workers() -> list[psutil.Process]:
    """The patch workers of this test process that are alive."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if patch_worker.__name__ in child.cmdline():
                found.append(child)
    return found


async def a_worker() -> psutil.Process:
    async def runs() -> bool:
        return bool(workers())

    await until(runs, "a worker runs")
    return workers()[0]
