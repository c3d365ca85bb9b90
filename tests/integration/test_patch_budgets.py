"""Which patches are built and kept when there are many bases and little machine: real workers on real files."""

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from msgspec.structs import replace

from common import delta
from common.artifact import ArtifactRef, ReleaseManifest, TensorSpec, Variant
from common.artifact.digest import digest_of
from common.artifact.source import BytesSource
from common.delta import CODECS
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.wire import Capabilities, ReportedModel, ReportedState
from controller.devices import Device
from controller.operations import create_rollout
from controller.orders import decode_order
from controller.reconciler import Reconciler
from controller.registry import patch_process
from controller.registry.blobs import LocalBlobs
from controller.registry.patch_facts import DataFile, data_file
from controller.registry.patches import REVIEW_S, PatchBuilder
from controller.rollouts.model import RolloutSpec
from controller.store.port import Order, Patch, Release, Transaction
from tests.integration.patch_bench import WITHIN_S, a_worker, ask, building, hold, patch_of, settled, until, workers
from tests.integration.registry_bench import Bench, open_bench

FILE_BYTES = 20_000
CHANGED_BYTES = 4_000
"""A patch holds these bytes and little more: they are random."""
PATCH_BYTES_MAX = CHANGED_BYTES + 500


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async for made in open_bench(tmp_path, time.time()):
        yield made


class Files:
    """Versions of one file: each differs from every other in the same random `CHANGED_BYTES`."""

    def __init__(self, bench: Bench, seed: int = 1) -> None:
        self._bench = bench
        self._dice = random.Random(seed)
        self._common = self._dice.randbytes(FILE_BYTES - CHANGED_BYTES)

    async def new(self) -> ArtifactRef:
        return await self._bench.upload(self._common + self._dice.randbytes(CHANGED_BYTES))


@pytest.fixture
def files(bench: Bench) -> Files:
    return Files(bench)


async def release(bench: Bench, version: str, **files: ArtifactRef) -> None:
    """A release whose ONNX file is called `model`; published a second after the one before."""
    bench.clock.time += 1
    tensor = TensorSpec("x", "FP32", (-1, 3))
    manifest = ReleaseManifest(
        ModelName("detector"), Version(version), {"default": Variant(dict(files), "model", (tensor,), (tensor,))}
    )
    envelope = await bench.upload(version.encode())
    made = Release(
        ref=manifest.release, manifest=manifest, envelope=envelope, published_at=bench.clock.time, published_by="ada"
    )
    await bench.store.write(lambda tx: tx.releases.add(made))


async def order_of(bench: Bench, kind: str) -> list[object]:
    return [event.data["base"] for event in await bench.events(kind)]


async def state_of(bench: Bench, base: ArtifactRef, target: ArtifactRef) -> tuple[str, str | None]:
    patch = await patch_of(bench, base, target)
    return patch.state, patch.skipped_for


# Which comes first


async def test_the_base_that_most_devices_hold_comes_first(bench: Bench, files: Files) -> None:
    target, rare, common, middle = [await files.new() for _ in range(4)]
    for base, holders in ((rare, 1), (common, 3), (middle, 2)):
        await ask(bench, base, target, holders=holders)
        bench.clock.time += 1
    async with building(bench, workers=1):
        await settled(bench, rare, target)
    assert await order_of(bench, "patch.ready") == [common.digest, middle.digest, rare.digest]


async def test_a_base_that_no_device_holds_is_skipped_until_somebody_asks_again(bench: Bench, files: Files) -> None:
    base, target = await files.new(), await files.new()
    await ask(bench, base, target, holders=0)
    async with building(bench) as builder:
        patch = await settled(bench, base, target)
        assert (patch.state, patch.skipped_for, patch.reason) == ("skipped", "unheld", "no device holds its base")
        (event,) = await bench.events("patch.skipped")
        assert (event.subject, event.data["reason"]) == (target.digest, patch.reason)
        assert (await ask(bench, base, target, holders=1)).state == "pending"
        builder.nudge()
        assert (await settled(bench, base, target)).state == "ready"


async def test_devices_are_counted_again_after_a_nudge(bench: Bench, files: Files) -> None:
    first, second, target = [await files.new() for _ in range(3)]
    async with building(bench) as builder:
        for base in (first, second):
            await ask(bench, base, target)
            builder.nudge()
            assert (await settled(bench, base, target)).state == "ready"
    assert await bench.events("patch.skipped") == []


# Workers


async def two_workers_run() -> bool:
    return len(workers()) == 2


async def test_patches_are_built_side_by_side(bench: Bench, files: Files) -> None:
    target, first, second = [await files.new() for _ in range(3)]
    for base in (first, second):
        await ask(bench, base, target)

    async with building(bench, workers=2):
        await until(two_workers_run, "two workers run at once")
        assert (await settled(bench, first, target)).state == "ready"
        assert (await settled(bench, second, target)).state == "ready"


async def test_no_more_workers_run_than_are_allowed(bench: Bench, files: Files) -> None:
    target, *bases = [await files.new() for _ in range(4)]
    for base in bases:
        await ask(bench, base, target)
    seen: list[int] = []

    async def all_settled() -> bool:
        seen.append(len(workers()))
        return all([(await patch_of(bench, base, target)).state != "pending" for base in bases])

    async with building(bench, workers=1):
        await until(all_settled, "all are settled")
    assert set(seen) <= {0, 1} and 1 in seen


async def test_stopping_ends_every_worker(bench: Bench, files: Files) -> None:
    target, first, second = [await files.new() for _ in range(3)]
    for base in (first, second):
        await ask(bench, base, target)

    async with building(bench, workers=2):
        await until(two_workers_run, "two workers run at once")
        running = workers()
    assert not any(worker.is_running() for worker in running)
    assert {(await patch_of(bench, base, target)).state for base in (first, second)} == {"pending"}


async def test_one_worker_that_is_killed_disturbs_no_other(bench: Bench, files: Files) -> None:
    target, first, second = [await files.new() for _ in range(3)]
    for base in (first, second):
        await ask(bench, base, target)

    async with building(bench, workers=2):
        await until(two_workers_run, "two workers run at once")
        workers()[0].kill()
        ends = [await settled(bench, base, target) for base in (first, second)]
    assert sorted(patch.state for patch in ends) == ["failed", "ready"]


async def test_a_controller_that_is_killed_leaves_no_worker_and_the_next_one_builds(
    bench: Bench, tmp_path: Path, files: Files
) -> None:
    base, target = await files.new(), await files.new()
    await ask(bench, base, target)
    with a_controller(tmp_path) as controller:
        worker = await _child_of(controller.pid)
        worker.suspend()  # so that it is in the middle of its work, whatever the machine's speed
        controller.kill()
    worker.resume()
    await asyncio.to_thread(psutil.wait_procs, [worker], timeout=WITHIN_S)
    assert not worker.is_running()
    assert (await patch_of(bench, base, target)).state == "pending"
    blobs = bench.blobs = LocalBlobs(tmp_path / "blobs")
    assert list((tmp_path / "blobs" / "incoming").iterdir()) == []
    async with building(bench):
        patch = await settled(bench, base, target)
    assert patch.patch is not None and blobs.find(patch.patch.digest) == patch.patch


@contextlib.contextmanager
def a_controller(folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """The part of a controller that builds patches, as a process."""
    with subprocess.Popen([sys.executable, "-m", "tests.integration.builder_process", str(folder)]) as process:
        try:
            yield process
        finally:
            process.kill()


async def _child_of(parent: int) -> psutil.Process:
    async def has_one() -> bool:
        return bool(psutil.Process(parent).children())

    await until(has_one, "it has started a worker")
    return psutil.Process(parent).children()[0]


# CPU


async def test_a_patch_that_takes_too_much_cpu_fails_and_is_paid_for(bench: Bench) -> None:
    """Both files are 4 GB of holes: reading and hashing them takes longer than a second, whatever the codec."""
    base, target = holes(bench, "base"), holes(bench, "target")
    await ask(bench, base, target)
    async with building(bench, build_cpu_s_max=1):
        patch = await settled(bench, base, target)
    assert (patch.state, patch.reason) == ("failed", "building took more than 1 CPU s (patch_build_cpu_s_max)")
    assert 0.5 < patch.cpu_s < 2.5
    (event,) = await bench.events("patch.failed")
    assert event.data["cpu_s"] == round(patch.cpu_s, 3)


def holes(bench: Bench, name: str) -> ArtifactRef:
    """A blob of 4 GB that takes no room. Its name is not its digest, which nobody gets to find out."""
    artifact = ArtifactRef(digest_of(name.encode()), 4 * 2**30)
    path = bench.blobs.incoming_path()
    with path.open("wb") as file:
        file.truncate(artifact.size)
    bench.blobs.adopt(path, artifact)
    return artifact


async def test_a_worker_that_hangs_is_given_up(bench: Bench, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_process, "WALL_S_MIN", 1.0)
    monkeypatch.setattr(patch_process, "WALL_PER_CPU_MAX", 0.0)
    base, target = await files.new(), await files.new()
    await ask(bench, base, target)
    async with building(bench):
        worker = await a_worker()
        worker.suspend()
        patch = await settled(bench, base, target)
    assert (patch.state, patch.reason) == ("failed", "building took longer than 1 s")
    assert not worker.is_running()


async def test_when_the_cpu_budget_of_a_file_is_spent_the_rest_is_skipped_at_once(bench: Bench, files: Files) -> None:
    target, other, first, second = [await files.new() for _ in range(4)]
    await ask(bench, first, target, holders=2)
    await ask(bench, second, target)
    await ask(bench, second, other)
    async with building(bench, workers=1, cpu_s_per_release=0.001):
        late = await settled(bench, second, target)
        assert (await settled(bench, second, other)).state == "ready"
    assert (await patch_of(bench, first, target)).state == "ready"
    assert (late.state, late.skipped_for, late.cpu_s) == ("skipped", "cpu", 0.0)
    assert "patch_cpu_s_per_release" in late.reason


async def test_a_larger_cpu_budget_builds_what_it_skipped_if_it_is_still_of_use(bench: Bench, files: Files) -> None:
    target, outdated, base, idle = [await files.new() for _ in range(4)]
    await release(bench, "1", model=outdated)
    await release(bench, "2", model=target)
    for from_, to in ((base, target), (base, outdated), (idle, target)):
        await ask(bench, from_, to)
    async with building(bench, cpu_s_per_release=0):
        for from_, to in ((base, target), (base, outdated), (idle, target)):
            assert (await settled(bench, from_, to)).skipped_for == "cpu"
    await hold(bench, idle, 0)
    async with building(bench):

        async def ready() -> bool:
            return (await patch_of(bench, base, target)).state == "ready"

        await until(ready, "it is built after all")
        assert await state_of(bench, base, outdated) == ("skipped", "cpu")
        assert await state_of(bench, idle, target) == ("skipped", "cpu")
    assert await ask(bench, base, outdated) == await patch_of(bench, base, outdated), "asking does not raise a budget"


# Disk


async def test_room_is_made_by_the_least_useful_patches(bench: Bench, files: Files) -> None:
    """Held by nobody, then to an old release; what is as useful as the new one stays, and the new one is skipped."""
    old, target, *bases = [await files.new() for _ in range(7)]
    to_old, unheld, useful, third, fourth = bases
    await release(bench, "1", model=old)
    await release(bench, "2", model=target)
    pairs = ((to_old, old), (unheld, target), (useful, target), (third, target), (fourth, target))
    room = 3 * PATCH_BYTES_MAX
    async with building(bench, disk_bytes_max=room) as builder:
        for base, to in pairs[:3]:
            await ask(bench, base, to)
            builder.nudge()
            assert (await settled(bench, base, to)).state == "ready"
        await hold(bench, unheld, 0)
        gone = await made(bench, unheld, target)

        await ask(bench, third, target)
        builder.nudge()
        assert (await settled(bench, third, target)).state == "ready"
        assert await state_of(bench, unheld, target) == ("skipped", "disk")
        assert bench.blobs.find(gone.digest) is None and await bench.row_of(gone) is None

        await ask(bench, fourth, target)
        builder.nudge()
        assert (await settled(bench, fourth, target)).state == "ready"
        assert await state_of(bench, to_old, old) == ("skipped", "disk")

        fifth = await files.new()
        await ask(bench, fifth, target)
        builder.nudge()
        late = await settled(bench, fifth, target)
    assert (late.state, late.skipped_for, late.patch) == ("skipped", "disk", None)
    assert CHANGED_BYTES < late.needs_bytes < PATCH_BYTES_MAX and "patch_disk_bytes_max" in late.reason
    assert await bench.store.read(lambda tx: tx.patches.ready_bytes()) <= room
    for base in (useful, third, fourth):
        assert bench.blobs.find((await made(bench, base, target)).digest) is not None


async def made(bench: Bench, base: ArtifactRef, target: ArtifactRef) -> ArtifactRef:
    patch = await patch_of(bench, base, target)
    assert patch.patch is not None
    return patch.patch


async def test_a_patch_without_room_is_built_again_when_less_useful_ones_leave_some(bench: Bench, files: Files) -> None:
    target, first, second = [await files.new() for _ in range(3)]
    await release(bench, "1", model=target)
    async with building(bench, workers=1, disk_bytes_max=PATCH_BYTES_MAX) as builder:
        for base in (first, second):
            await ask(bench, base, target)
            builder.nudge()
            await settled(bench, base, target)
        assert await state_of(bench, second, target) == ("skipped", "disk")
        await hold(bench, first, 0)
        bench.clock.time += REVIEW_S
        builder.nudge()

        async def ready() -> bool:
            return (await patch_of(bench, second, target)).state == "ready"

        await until(ready, "there is room")
        assert await state_of(bench, first, target) == ("skipped", "disk")


async def test_a_smaller_disk_budget_is_kept_from_the_next_start_on(bench: Bench, files: Files) -> None:
    target, common, rare = [await files.new() for _ in range(3)]
    await release(bench, "1", model=target)
    await ask(bench, common, target, holders=2)
    await ask(bench, rare, target)
    async with building(bench):
        for base in (common, rare):
            assert (await settled(bench, base, target)).state == "ready"
    async with building(bench, disk_bytes_max=PATCH_BYTES_MAX):

        async def within() -> bool:
            return await bench.store.read(lambda tx: tx.patches.ready_bytes()) <= PATCH_BYTES_MAX

        await until(within, "the budget is kept")
        assert await state_of(bench, common, target) == ("ready", None)
        assert await state_of(bench, rare, target) == ("skipped", "disk")


async def test_bytes_that_a_release_needs_stay_when_the_patch_goes(bench: Bench, files: Files) -> None:
    base, target = await files.new(), await files.new()
    await ask(bench, base, target)
    async with building(bench):
        await settled(bench, base, target)
    patch = await made(bench, base, target)
    await release(bench, "1", model=patch)
    async with building(bench, disk_bytes_max=0):

        async def skipped() -> bool:
            return (await patch_of(bench, base, target)).state == "skipped"

        await until(skipped, "the patch is gone")
    assert bench.blobs.find(patch.digest) == patch == await bench.row_of(patch)


# Before anyone is told


async def test_a_rollout_tells_its_devices_although_the_budget_is_spent(bench: Bench, files: Files) -> None:
    old, new = await files.new(), await files.new()
    await a_device_to_update(bench, old, new)
    async with building(bench, cpu_s_per_release=0) as builder:
        assert await patches_at_the_order(bench, builder) == [("skipped", "cpu")]


async def test_a_rollout_asks_again_for_a_patch_that_nobody_could_use_before(bench: Bench, files: Files) -> None:
    old, new = await files.new(), await files.new()
    async with building(bench) as builder:
        await ask(bench, old, new, holders=0)
        builder.nudge()
        assert (await settled(bench, old, new)).skipped_for == "unheld"
        await a_device_to_update(bench, old, new)
        assert await patches_at_the_order(bench, builder) == [("ready", None)]


async def a_device_to_update(bench: Bench, old: ArtifactRef, new: ArtifactRef) -> None:
    """Release 1, which the device runs, and a rollout of release 2 to it."""
    await release(bench, "1", model=old)
    await release(bench, "2", model=new)
    name, detector = DeviceId("press-1"), ModelName("detector")
    entry = ReportedModel(model=detector, running=Version("1"), artifact=old.digest, phase="idle", generation=1)
    device = Device(
        id=name,
        created_at=1.0,
        capabilities=Capabilities(agent_version="1", patch_codecs=CODECS),
        reported=ReportedState(
            device=name, epoch=1, seq=1, sent_at=1.0, generation=1, models=(entry,), held=(old.digest,)
        ),
        assigned={detector: Version("1")},
        generation=1,
    )
    spec, now = RolloutSpec(release=ReleaseRef(detector, Version("2"))), bench.clock.now()

    def work(tx: Transaction) -> None:
        tx.devices.put(device)
        create_rollout(tx, spec, id="r1", salt="s", actor="ada", now=now, traceparent=None)

    await bench.store.write(work)


async def patches_at_the_order(bench: Bench, builder: PatchBuilder) -> list[tuple[str, str | None]]:
    """Reconcile until a device is told of release 2; what had become of the patches to it by then."""
    found: list[tuple[str, str | None]] = []

    async def publish(order: Order) -> None:
        (model,) = decode_order(order).models
        patches = await bench.store.read(lambda tx: tx.patches.for_target(model.files[0].artifact.digest))
        found.extend((patch.state, patch.skipped_for) for patch in patches)

    reconciler = Reconciler(bench.store, publish, bench.signer, bench.clock, patches_requested=builder.nudge)

    async def told() -> bool:
        await reconciler.reconcile()
        return bool(found)

    await until(told, "the device is told")
    return found


# Codecs and external data


async def test_a_patch_is_built_in_the_codec_that_was_asked_for(bench: Bench, files: Files) -> None:
    base, target = await files.new(), await files.new()
    for codec in CODECS:
        await ask(bench, base, target, codec)
    async with building(bench):
        for codec in CODECS:
            patch = (await settled(bench, base, target, codec)).patch
            assert patch is not None
            source = BytesSource(bench.blobs.read(patch.digest, 0, patch.size))
            assert delta.inspect(source).codec == codec


async def test_external_data_is_compared_tensor_by_tensor(bench: Bench, tmp_path: Path) -> None:
    """The last bits of every weight differ, so that no two bytes in a row are the same in both data files."""
    weights = np.random.default_rng(1).normal(0, 0.02, (300, 400)).astype(np.float32)
    tuned = (weights.view(np.uint32) + np.random.default_rng(2).integers(1, 40, weights.shape, np.uint32)).view(
        np.float32
    )
    old_model, old = [await bench.upload(file) for file in with_external_data(tmp_path / "old", weights)]
    new_model, new = [await bench.upload(file) for file in with_external_data(tmp_path / "new", tuned)]

    async def built() -> Patch:
        await ask(bench, old, new)
        async with building(bench):
            return await settled(bench, old, new)

    blind = await built()
    await bench.store.write(lambda tx: tx.patches.put(replace(blind, state="pending", patch=None)))
    await release(bench, "1", model=old_model, weights=old)
    await release(bench, "2", model=new_model, weights=new)
    seeing = await built()
    assert seeing.patch is not None and seeing.patch.size < new.size * 0.25
    assert blind.patch is None or seeing.patch.size < blind.patch.size


def with_external_data(folder: Path, weights: Any) -> tuple[bytes, bytes]:
    """An ONNX model that keeps `weights` in a data file called `weights`, and that file."""
    folder.mkdir()
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 300] x) => (float[N, 400] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, folder / "model", save_as_external_data=True, location="weights", size_threshold=0)
    return (folder / "model").read_bytes(), (folder / "weights").read_bytes()


async def test_the_model_that_describes_a_data_file_is_found_in_the_manifests(bench: Bench, files: Files) -> None:
    model, data, shared, stranger = [await files.new() for _ in range(4)]
    await release(bench, "1", model=model, weights=data, other=shared)
    await release(bench, "2", model=shared, weights=data)

    async def described(file: ArtifactRef) -> object:
        return await bench.store.read(lambda tx: data_file(tx, file.digest))

    assert await described(data) == DataFile(shared.digest, "weights")
    assert await described(model) is None, "it describes itself"
    assert await described(shared) is None, "it is a model itself in another release"
    assert await described(stranger) is None
