"""Patches built by a real worker process, on real models, while things go wrong around it."""

import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from common import delta
from common.artifact.digest import digest_of
from common.artifact.manifest import ArtifactRef
from common.artifact.source import BytesSource
from common.delta import CODECS
from common.ids import Digest
from controller.registry import patch_worker, patches
from controller.registry.blobs import LocalBlobs
from controller.registry.patches import PatchBuilder
from tests.integration.patch_bench import PLENTY, WITHIN_S, a_worker, ask, building, patch_of, settled, until
from tests.integration.registry_bench import Bench, open_bench


def recalibrated(model: bytes) -> bytes:
    """The model with a few weights changed, as fitting the last layer again would do."""
    changed = bytearray(model)
    changed[2_000_000:2_000_400] = random.Random(1).randbytes(400)
    return bytes(changed)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async for made in open_bench(tmp_path, time.time()):
        yield made


@pytest.fixture
async def pair(bench: Bench, real_models: tuple[Path, Path]) -> tuple[ArtifactRef, ArtifactRef]:
    """A real model and its recalibrated successor, uploaded."""
    model = await asyncio.to_thread(real_models[1].read_bytes)
    return await bench.upload(model), await bench.upload(recalibrated(model))


Pair = tuple[ArtifactRef, ArtifactRef]


async def test_a_patch_rebuilds_its_target_and_is_much_smaller(bench: Bench, pair: Pair) -> None:
    base, target = pair
    await ask(bench, base, target)
    async with building(bench):
        patch = await settled(bench, base, target)
    assert patch.state == "ready" and patch.patch is not None
    assert patch.patch.size < target.size * 0.02
    rebuilt = bytearray()
    source = BytesSource(bench.blobs.read(base.digest, 0, base.size))
    made = BytesSource(bench.blobs.read(patch.patch.digest, 0, patch.patch.size))
    delta.apply(source, made, rebuilt.extend, target=target)
    assert digest_of(rebuilt) == target.digest
    (event,) = await bench.events("patch.ready")
    assert event.subject == target.digest
    assert event.data == {
        "base": base.digest, "codec": CODECS[0], "full_size": target.size, "size": patch.patch.size,
        "cpu_s": round(patch.cpu_s, 3),
    }  # fmt: skip
    assert 0 < patch.cpu_s < WITHIN_S
    assert await bench.row_of(patch.patch) == patch.patch


async def test_a_nudge_is_enough_to_wake_the_builder(bench: Bench, pair: Pair) -> None:
    async with building(bench) as builder:
        await ask(bench, *pair)
        builder.nudge()
        assert (await settled(bench, *pair)).state == "ready"


async def test_asking_twice_builds_once(bench: Bench, pair: Pair) -> None:
    first = await ask(bench, *pair)
    bench.clock.time += 10
    assert await ask(bench, *pair) == first
    async with building(bench):
        ready = await settled(bench, *pair)
        assert await ask(bench, *pair) == ready
    assert len(await bench.events("patch.ready")) == 1


async def test_a_patch_that_would_save_little_is_not_worth_it_and_leaves_no_bytes(bench: Bench) -> None:
    dice = random.Random(2)
    base, target = await bench.upload(dice.randbytes(30_000)), await bench.upload(dice.randbytes(30_000))
    await ask(bench, base, target)
    async with building(bench):
        patch = await settled(bench, base, target)
    assert (patch.state, patch.patch) == ("not_worth", None)
    assert "90%" in patch.reason
    assert {blob.artifact for blob in bench.blobs.all()} == {base, target}
    assert len(await bench.events("patch.not_worth")) == 1


async def test_what_can_never_be_built_fails_with_the_reason(bench: Bench, pair: Pair) -> None:
    base, target = pair
    gone = ArtifactRef(digest_of(b"collected long ago"), 1)
    await ask(bench, gone, target)
    await ask(bench, base, target, "codec-of-the-future.9")
    async with building(bench):
        assert "is not here any more" in (await settled(bench, gone, target)).reason
        assert "codec-of-the-future.9" in (await settled(bench, base, target, "codec-of-the-future.9")).reason
    assert len(await bench.events("patch.failed")) == 2


async def test_a_base_that_the_disk_has_damaged_is_found_out(bench: Bench, pair: Pair) -> None:
    base, target = pair
    spoil(bench.blobs, base.digest)
    await ask(bench, base, target)
    async with building(bench):
        patch = await settled(bench, base, target)
    assert patch.state == "failed" and "damaged" in patch.reason


def spoil(blobs: LocalBlobs, digest: Digest) -> None:
    path = blobs.path(digest)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 1
    path.write_bytes(data)


async def test_a_worker_that_dies_fails_its_patch_and_the_next_one_is_built(
    bench: Bench, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    base, target = pair
    async with building(bench) as builder:
        await ask(bench, base, target)
        builder.nudge()
        (await a_worker()).kill()
        patch = await settled(bench, base, target)
        assert (patch.state, patch.reason) == ("failed", "the worker broke with status -9")
        await ask(bench, target, base)
        builder.nudge()
        assert (await settled(bench, target, base)).state == "ready"
    assert [record.levelno for record in caplog.records if "worker broke" in record.message] == [logging.ERROR]


async def test_a_worker_is_nice_to_the_controller(tmp_path: Path) -> None:
    with stuck_worker(tmp_path) as worker:
        await until(lambda: _nice(worker), "the worker has lowered its priority")


async def _nice(worker: "subprocess.Popen[bytes]") -> bool:
    return bool(psutil.Process(worker.pid).nice() == min(19, os.nice(0) + patch_worker.NICENESS))


async def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """Its standard input ends when the parent does, however the parent ends."""
    with stuck_worker(tmp_path) as worker:
        assert worker.poll() is None
        out, _ = await asyncio.to_thread(worker.communicate, timeout=WITHIN_S)
        assert (worker.returncode, out) == (1, b"")


@contextlib.contextmanager
def stuck_worker(folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A worker that would wait for ever, because its base is a pipe that nobody writes to."""
    os.mkfifo(folder / "pipe")
    nothing = ArtifactRef(digest_of(b""), 0)
    order = patch_worker.Order(
        base=nothing,
        base_path=str(folder / "pipe"),
        target=nothing,
        target_path=str(folder / "pipe"),
        out=str(folder / "out"),
        bytes_max=1,
        codec=CODECS[0],
        cpu_s_max=60,
    )
    command = [sys.executable, "-m", patch_worker.__name__, msgspec.json.encode(order).decode()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        try:
            yield worker
        finally:
            worker.kill()


async def test_stopping_drops_the_patch_under_way_and_a_restart_builds_it(bench: Bench, pair: Pair) -> None:
    await ask(bench, *pair)
    async with building(bench):
        worker = await a_worker()
    assert not worker.is_running()
    assert (await patch_of(bench, *pair)).state == "pending"
    async with building(bench):
        assert (await settled(bench, *pair)).state == "ready"


class FullDisk(LocalBlobs):
    """The kernel's own full disk, while `full`."""

    full = True
    tries = 0

    def incoming_path(self) -> Path:
        path = super().incoming_path()
        self.tries += 1
        if self.full:
            path.unlink()
            path.symlink_to("/dev/full")
        return path


async def test_a_full_disk_is_no_verdict_and_the_patch_is_tried_again(
    tmp_path: Path, real_models: tuple[Path, Path]
) -> None:
    model = await asyncio.to_thread(real_models[1].read_bytes)
    blobs = FullDisk(tmp_path / "blobs")
    async for bench in open_bench(tmp_path, time.time(), blobs):
        blobs.full = False
        pair = (await bench.upload(model), await bench.upload(recalibrated(model)))
        blobs.full, blobs.tries = True, 0
        await ask(bench, *pair)

        async def tried_again() -> bool:
            return blobs.tries > 1

        async with building(bench):
            await until(tried_again, "a second try")
            assert (await patch_of(bench, *pair)).state == "pending"
            blobs.full = False
            assert (await settled(bench, *pair)).state == "ready"


async def test_watchers_hear_how_far_a_long_build_is(bench: Bench, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PROGRESS_INTERVAL_S", 0.0)
    await ask(bench, *pair)
    async with building(bench):
        await settled(bench, *pair)
    events = await bench.events("patch.progress")
    done = [event.data["done"] for event in events]
    assert len(events) > 1
    assert done == sorted(done, key=lambda value: int(str(value)))
    assert {event.subject for event in events} == {pair[1].digest}


async def test_a_builder_that_is_cancelled_in_the_moment_of_a_nudge_ends(bench: Bench) -> None:
    for _ in range(5):
        builder = PatchBuilder(bench.store, bench.blobs, bench.clock, PLENTY, uniform=lambda: 0.0)
        running = asyncio.create_task(builder.run())
        await asyncio.sleep(0.1)  # long enough to be waiting for a nudge; if not, the cancellation is noticed anyway
        builder.nudge()
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=10)
        assert done, "the nudge swallowed the cancellation"
