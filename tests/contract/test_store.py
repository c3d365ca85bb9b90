"""What every adapter of the store must do, run over each of them. A new adapter adds a line to `ADAPTERS`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from common.artifact import ArtifactRef, ReleaseManifest, TensorSpec, Variant
from common.artifact.digest import digest_of
from common.clock import SystemClock
from common.errors import Conflict, Unavailable
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.monitoring.reference import Classes, Reference, encode_reference
from common.monitoring.sketch import FeatureCounts, Sketch
from common.wire import (
    LATENCY_BOUNDS_S,
    Capabilities,
    DeviceWindow,
    Heartbeat,
    ReportedModel,
    ReportedState,
    TelemetryWindow,
)
from controller.devices import Device
from controller.rollouts.model import Execution, ExecutionState, PhaseSpec, Rollout, RolloutSpec, RolloutState
from controller.store import open_store
from controller.store.port import (
    DEVICES_PER_CLASS_MAX,
    FINDINGS_PER_FILE_MAX,
    AuditEntry,
    DeviceTotals,
    Event,
    FileParts,
    FoundVariant,
    Order,
    Patch,
    PatchState,
    Release,
    ReleaseTotals,
    Store,
    StoredResponse,
    Token,
    Transaction,
)

ADAPTERS: dict[str, Callable[[Path], Awaitable[Store]]] = {
    "sqlite": lambda folder: open_store(f"sqlite:///{folder}/ferry.db", SystemClock()),
}
BUCKETS = len(LATENCY_BOUNDS_S) + 1
DETECTOR = ModelName("detector")
ALICE, BOB, CAROL = DeviceId("alice"), DeviceId("bob"), DeviceId("carol")


@pytest.fixture(params=sorted(ADAPTERS))
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    opened = await ADAPTERS[request.param](tmp_path)
    yield opened
    await opened.close()


class Refused(Exception):
    """What a work raises on purpose."""


def blob(name: str) -> ArtifactRef:
    return ArtifactRef(digest_of(name.encode()), len(name))


def release(version: str, *files: str, model: str = "detector") -> Release:
    tensor = TensorSpec("x", "FP32", (-1, 3))
    variants = {
        f"v{index}": Variant({"m.onnx": blob(name)}, "m.onnx", (tensor,), (tensor,)) for index, name in enumerate(files)
    }
    manifest = ReleaseManifest(ModelName(model), Version(version), variants)
    return Release(
        ref=manifest.release,
        manifest=manifest,
        envelope=blob(f"envelope of {model}@{version}"),
        published_at=1.5,
        published_by="ada",
    )


def file_parts(file: str, data: bytes) -> FileParts:
    return FileParts(file=blob(file).digest, index=blob(data.decode()), data=data)


def patch(
    base: str,
    target: str,
    state: PatchState = "pending",
    *,
    created_at: float = 1.0,
    patch: ArtifactRef | None = None,
    reason: str = "",
) -> Patch:
    return Patch(
        base=blob(base).digest,
        target=blob(target).digest,
        codec="c.1",
        state=state,
        created_at=created_at,
        patch=patch,
        reason=reason,
    )


def rollout(name: str, state: RolloutState = RolloutState.RUNNING) -> Rollout:
    spec = RolloutSpec(
        release=ReleaseRef(DETECTOR, Version("2")), phases=(PhaseSpec(percent=20), PhaseSpec(percent=100))
    )
    return Rollout(id=name, spec=spec, salt="s", created_at=1.0, created_by="ada", state=state)


def sketch_of(*counts: int, low: float | None = None) -> Sketch:
    return Sketch(reference=blob("reference").digest, observations=1, features=(FeatureCounts(counts, low),))


def window(
    started_at: float, requests: int = 10, errors: int = 0, version: str = "1", sketch: Sketch | None = None
) -> TelemetryWindow:
    return TelemetryWindow(
        model=DETECTOR,
        version=Version(version),
        started_at=started_at,
        ended_at=started_at + 10,
        requests=requests,
        errors=errors,
        latency_counts=tuple(range(BUCKETS)),
        latency_sum_s=0.5,
        queue_counts=tuple(reversed(range(BUCKETS))),
        queue_sum_s=0.25,
        queue_max_s=0.125,
        run_counts=(3, *(0,) * 6, 1),
        run_rows=100,
        run_sum_s=1.0,
        refused=1,
        expired=2,
        cancelled=3,
        labelled=4,
        correct=2,
        sketch=sketch,
    )


async def put_device(store: Store, *names: str) -> None:
    def work(tx: Transaction) -> None:
        for name in names:
            tx.devices.put(Device(id=DeviceId(name), created_at=1.0))

    await store.write(work)


# Units of work


async def test_a_write_returns_what_the_work_returned_and_a_read_sees_it(store: Store) -> None:
    def work(tx: Transaction) -> int:
        tx.devices.put(Device(id=ALICE, created_at=1.0))
        return 42

    assert await store.write(work) == 42
    assert await store.read(lambda tx: tx.devices.get(ALICE)) == Device(id=ALICE, created_at=1.0)


async def test_a_work_that_raises_changes_nothing_and_its_caller_hears_it(store: Store) -> None:
    def work(tx: Transaction) -> None:
        tx.devices.put(Device(id=ALICE, created_at=1.0))
        raise Refused

    with pytest.raises(Refused):
        await store.write(work)
    assert await store.read(lambda tx: tx.devices.get(ALICE)) is None


async def test_works_that_wait_together_fail_apart(store: Store) -> None:
    def work(tx: Transaction, number: int) -> int:
        tx.devices.put(Device(id=DeviceId(f"device-{number:03}"), created_at=1.0))
        if number % 3 == 0:
            raise Refused
        return number

    outcomes = await asyncio.gather(
        *(store.write(partial(work, number=number)) for number in range(100)), return_exceptions=True
    )
    kept = [number for number in range(100) if number % 3]
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == kept
    assert sum(isinstance(outcome, Refused) for outcome in outcomes) == 100 - len(kept)
    devices = await store.read(lambda tx: [device.id for device in tx.devices.all()])
    assert devices == [f"device-{number:03}" for number in kept]


async def test_works_run_one_after_the_other_in_the_order_they_came(store: Store) -> None:
    def append(tx: Transaction, number: int) -> None:
        tx.journal.append_event(Event(kind="count", subject="s", at=0.0, data={"number": number}))

    await asyncio.gather(*(store.write(partial(append, number=number)) for number in range(50)))
    events = await store.read(lambda tx: tx.journal.events_after(0, 100))
    assert [event.data["number"] for event in events] == list(range(50))


async def test_works_that_read_and_then_write_lose_no_update(store: Store) -> None:
    await put_device(store, "alice")

    def increment(tx: Transaction) -> None:
        device = tx.devices.get(ALICE)
        assert device is not None
        tx.devices.put(Device(id=ALICE, created_at=1.0, epoch=device.epoch + 1))

    await asyncio.gather(*(store.write(increment) for _ in range(64)))
    device = await store.read(lambda tx: tx.devices.get(ALICE))
    assert device is not None and device.epoch == 64


async def test_a_read_sees_one_snapshot_while_others_write(store: Store) -> None:
    await put_device(store, "alice")
    loop = asyncio.get_running_loop()

    def look_twice(tx: Transaction) -> tuple[int, int]:
        before = len(list(tx.devices.all()))
        asyncio.run_coroutine_threadsafe(put_device(store, "bob"), loop).result(30)
        return before, len(list(tx.devices.all()))

    assert await store.read(look_twice) == (1, 1)
    assert await store.read(lambda tx: len(list(tx.devices.all()))) == 2


async def test_a_read_cannot_write(store: Store) -> None:
    with pytest.raises(Exception, match="read"):
        await store.read(lambda tx: tx.devices.put(Device(id=ALICE, created_at=1.0)))
    assert await store.read(lambda tx: tx.devices.get(ALICE)) is None


async def test_closing_finishes_what_waits_and_refuses_what_comes_later(store: Store) -> None:
    waiting = [asyncio.ensure_future(put_device(store, f"device-{number}")) for number in range(20)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*waiting)
    with pytest.raises(Unavailable):
        await put_device(store, "late")
    with pytest.raises(Unavailable):
        await store.read(lambda tx: tx.devices.get(ALICE))


# Devices and orders


async def test_a_device_comes_back_as_it_was(store: Store) -> None:
    device = Device(
        id=ALICE,
        created_at=1.25,
        labels={"site": "Zürich"},
        capabilities=Capabilities(agent_version="1", patch_codecs=("c.1",)),
        connected=True,
        epoch=3,
        last_seen=2.5,
        heartbeat=Heartbeat(
            device=ALICE, epoch=3, seq=1, sent_at=2.5, uptime_s=1, load_1m=0.1, cpu_percent=3, memory_bytes=2**40,
            memory_available_bytes=1, disk_bytes=1, disk_free_bytes=1, generation=2, running={DETECTOR: Version("1")},
        ),
        reported=ReportedState(
            device=ALICE, epoch=3, seq=2, sent_at=2.0, generation=2,
            models=(
                ReportedModel(
                    model=DETECTOR, running=Version("1"), artifact=blob("a").digest, phase="idle", generation=2
                ),
            ),
            held=(blob("a").digest,),
        ),
        assigned={DETECTOR: Version("2")},
        generation=2,
        revision=7,
    )  # fmt: skip
    await store.write(lambda tx: tx.devices.put(device))
    assert await store.read(lambda tx: tx.devices.get(ALICE)) == device


async def test_devices_are_paged_in_order_of_their_ids(store: Store) -> None:
    await put_device(store, "b2", "a1", "b-1", "b1", "9")
    ids = ["9", "a1", "b-1", "b1", "b2"]
    assert await store.read(lambda tx: [device.id for device in tx.devices.all()]) == ids
    assert await store.read(lambda tx: [device.id for device in tx.devices.page("", 2)]) == ids[:2]
    assert await store.read(lambda tx: [device.id for device in tx.devices.page("a1", 2)]) == ids[2:4]
    assert await store.read(lambda tx: tx.devices.page("b2", 2)) == []


async def test_holders_of_each_file_are_counted_over_the_whole_fleet(store: Store) -> None:
    def work(tx: Transaction) -> None:
        tx.devices.put(Device(id=BOB, created_at=1.0))
        for number in range(1200):
            held = (blob("a"), blob("a"), blob("b")) if number % 3 else (blob("a"),)
            name = DeviceId(f"device-{number:04}")
            reported = ReportedState(
                device=name, epoch=1, seq=1, sent_at=1.0, generation=1, held=tuple(one.digest for one in held)
            )
            tx.devices.put(Device(id=name, created_at=1.0, reported=reported))

    assert await store.read(lambda tx: tx.devices.holders()) == {}
    await store.write(work)
    holders = await store.read(lambda tx: tx.devices.holders())
    assert holders == {blob("a").digest: 1200, blob("b").digest: 800}


async def test_all_devices_may_be_changed_while_walking_over_them(store: Store) -> None:
    names = [f"device-{number:04}" for number in range(1200)]
    await put_device(store, *names)

    def work(tx: Transaction) -> int:
        seen = 0
        for device in tx.devices.all():
            tx.devices.put(Device(id=device.id, created_at=device.created_at, generation=1))
            seen += 1
        return seen

    assert await store.write(work) == 1200
    assert await store.read(lambda tx: {device.generation for device in tx.devices.all()}) == {1}


def order(device: DeviceId, generation: int, created_at: float = 1.0) -> Order:
    envelope = f"{device} {generation}".encode()
    return Order(
        device=device, generation=generation, etag=digest_of(envelope), envelope=envelope, created_at=created_at
    )


def put_order(tx: Transaction, generation: int) -> None:
    tx.orders.put(order(ALICE, generation))


async def test_an_order_is_only_replaced_by_a_newer_one(store: Store) -> None:
    await store.write(lambda tx: tx.orders.put(order(ALICE, 2)))
    for generation in (1, 2):
        with pytest.raises(Conflict):
            await store.write(partial(put_order, generation=generation))
    assert await store.read(lambda tx: tx.orders.get(ALICE)) == order(ALICE, 2)
    await store.write(lambda tx: tx.orders.put(order(ALICE, 3)))
    assert await store.read(lambda tx: tx.orders.get(ALICE)) == order(ALICE, 3)


async def test_unpublished_orders_come_oldest_first_until_the_broker_has_them(store: Store) -> None:
    def work(tx: Transaction) -> None:
        for device, created_at in ((ALICE, 3.0), (BOB, 1.0), (CAROL, 2.0)):
            tx.orders.put(order(device, 1, created_at))

    await store.write(work)
    assert await store.read(lambda tx: [o.device for o in tx.orders.unpublished(2)]) == [BOB, CAROL]
    await store.write(lambda tx: tx.orders.mark_published(BOB, 1))
    assert await store.read(lambda tx: [o.device for o in tx.orders.unpublished(9)]) == [CAROL, ALICE]
    kept = await store.read(lambda tx: tx.orders.get(BOB))
    assert kept is not None and kept.published


async def test_an_acknowledgement_of_an_old_order_does_not_hide_the_new_one(store: Store) -> None:
    await store.write(lambda tx: tx.orders.put(order(ALICE, 1)))
    await store.write(lambda tx: tx.orders.put(order(ALICE, 2)))
    await store.write(lambda tx: tx.orders.mark_published(ALICE, 1))
    assert await store.read(lambda tx: [o.generation for o in tx.orders.unpublished(9)]) == [2]


# Releases, artifacts, patches


async def test_a_release_is_added_once(store: Store) -> None:
    first = release("1.0", "a", "b")
    await store.write(lambda tx: tx.releases.add(first))
    with pytest.raises(Conflict):
        await store.write(lambda tx: tx.releases.add(release("1.0", "c")))
    assert await store.read(lambda tx: tx.releases.get(first.ref)) == first
    assert await store.read(lambda tx: tx.releases.get(ReleaseRef(DETECTOR, Version("2")))) is None


async def test_releases_are_paged_by_model_and_version_and_found_by_file(store: Store) -> None:
    published = [release("1", "a"), release("2", "b", "a"), release("1", "c", model="audio"), release("3", "d")]

    def work(tx: Transaction) -> None:
        for one in published:
            tx.releases.add(one)

    await store.write(work)

    def page(
        after: tuple[str, str] | None, limit: int, model: ModelName | None = None
    ) -> Callable[[Transaction], list[str]]:
        return lambda tx: [str(one.ref) for one in tx.releases.page(after, limit, model)]

    assert await store.read(page(None, 9)) == ["audio@1", "detector@1", "detector@2", "detector@3"]
    assert await store.read(page(("audio", "1"), 2)) == ["detector@1", "detector@2"]
    assert await store.read(page(("detector", "2"), 9)) == ["detector@3"]
    assert await store.read(page(None, 9, ModelName("audio"))) == ["audio@1"]
    assert await store.read(page(("detector", "1"), 9, DETECTOR)) == ["detector@2", "detector@3"]
    holders = await store.read(lambda tx: [str(one.ref) for one in tx.releases.by_artifact(blob("a").digest)])
    assert holders == ["detector@1", "detector@2"]


async def test_what_a_release_or_a_patch_of_one_needs_is_never_unused(store: Store) -> None:
    published = release("1", "file", "int8 file")
    needed = ("file", "int8 file", "good patch", "list")
    loose = ("upload", "stray patch", "failed patch", "stray list")

    def work(tx: Transaction) -> None:
        for name in (*needed, *loose):
            tx.artifacts.put(blob(name), at=10.0)
        tx.artifacts.put(published.envelope, at=10.0)
        tx.releases.add(published)
        tx.patches.put(patch("base", "file", state="ready", patch=blob("good patch")))
        tx.patches.put(patch("base", "no file of a release", state="ready", patch=blob("stray patch")))
        tx.patches.put(patch("other", "file", state="failed", patch=blob("failed patch")))
        tx.parts.put(file_parts("file", b"list"))
        tx.parts.put(file_parts("no file of a release", b"stray list"))

    await store.write(work)
    unused = await store.read(lambda tx: tx.artifacts.unused(before=11.0))
    assert unused == sorted(blob(name) for name in loose)
    assert await store.read(lambda tx: tx.artifacts.unused(before=10.0)) == []


async def test_a_repeated_upload_is_fresh_again(store: Store) -> None:
    await store.write(lambda tx: tx.artifacts.put(blob("a"), at=1.0))
    await store.write(lambda tx: tx.artifacts.put(blob("a"), at=20.0))
    assert await store.read(lambda tx: tx.artifacts.unused(before=11.0)) == []
    assert await store.read(lambda tx: tx.artifacts.get(blob("a").digest)) == blob("a")


async def test_a_file_has_one_list_of_parts_the_newest(store: Store) -> None:
    await store.write(lambda tx: tx.parts.put(file_parts("file", b"old")))
    await store.write(lambda tx: tx.parts.put(file_parts("file", b"newer")))
    assert await store.read(lambda tx: tx.parts.get(blob("file").digest)) == file_parts("file", b"newer")
    assert await store.read(lambda tx: tx.parts.get(blob("other").digest)) is None


async def test_removing_an_artifact_forgets_the_list_of_parts_that_it_was(store: Store) -> None:
    await store.write(lambda tx: tx.parts.put(file_parts("file", b"list")))
    await store.write(lambda tx: tx.artifacts.remove(blob("list").digest))
    assert await store.read(lambda tx: tx.parts.get(blob("file").digest)) is None


async def test_removing_an_artifact_forgets_the_patches_that_it_was(store: Store) -> None:
    def work(tx: Transaction) -> None:
        tx.artifacts.put(blob("p"), at=1.0)
        tx.patches.put(patch("a", "b", state="ready", patch=blob("p")))
        tx.patches.put(patch("c", "b", state="not_worth", reason="too big"))
        tx.artifacts.remove(blob("p").digest)

    await store.write(work)
    assert await store.read(lambda tx: tx.artifacts.get(blob("p").digest)) is None
    left = await store.read(lambda tx: tx.patches.for_target(blob("b").digest))
    assert left == [patch("c", "b", state="not_worth", reason="too big")]


async def test_patches_wait_oldest_first_until_they_are_settled(store: Store) -> None:
    def work(tx: Transaction) -> None:
        tx.patches.put(patch("a", "t", created_at=3.0))
        tx.patches.put(patch("b", "t", created_at=1.0))
        tx.patches.put(patch("c", "u", created_at=2.0))

    await store.write(work)
    assert [p.created_at for p in await store.read(lambda tx: tx.patches.pending(2))] == [1.0, 2.0]
    settled = patch("b", "t", created_at=1.0, state="ready", patch=blob("p"))
    await store.write(lambda tx: tx.patches.put(settled))
    assert [p.created_at for p in await store.read(lambda tx: tx.patches.pending(9))] == [2.0, 3.0]
    assert await store.read(lambda tx: tx.patches.get(settled.base, settled.target, "c.1")) == settled
    assert await store.read(lambda tx: tx.patches.get(settled.base, settled.target, "c.2")) is None


async def test_what_a_patch_costs_and_why_it_was_skipped_is_remembered(store: Store) -> None:
    no_room = replace(
        patch("a", "t", state="skipped", reason="no room"), skipped_for="disk", needs_bytes=2**40, cpu_s=1.25
    )
    unheld = replace(patch("b", "t", state="skipped", created_at=2.0), skipped_for="unheld")

    def work(tx: Transaction) -> None:
        for one in (no_room, unheld, patch("c", "t"), patch("d", "t", state="failed")):
            tx.patches.put(one)

    await store.write(work)
    assert await store.read(lambda tx: tx.patches.get(no_room.base, no_room.target, "c.1")) == no_room
    assert await store.read(lambda tx: tx.patches.skipped(9)) == [unheld, no_room]
    assert await store.read(lambda tx: tx.patches.skipped(1)) == [unheld]


async def test_only_patches_that_can_be_offered_take_room(store: Store) -> None:
    first = patch("a", "t", state="ready", patch=blob("12345"))
    second = patch("b", "t", state="ready", created_at=2.0, patch=blob("123"))
    assert await store.read(lambda tx: (tx.patches.ready(), tx.patches.ready_bytes())) == ([], 0)

    def work(tx: Transaction) -> None:
        for one in (second, first, replace(patch("c", "t", state="skipped"), skipped_for="disk", needs_bytes=100)):
            tx.patches.put(one)

    await store.write(work)
    assert await store.read(lambda tx: (tx.patches.ready(), tx.patches.ready_bytes())) == ([first, second], 8)


# Rollouts and tokens


async def test_rollouts_come_newest_first_and_active_ones_are_found(store: Store) -> None:
    states = (RolloutState.SUCCEEDED, RolloutState.PAUSED, RolloutState.ABORTED, RolloutState.ROLLING_BACK)

    def work(tx: Transaction) -> None:
        for number, state in enumerate(states):
            tx.rollouts.put(rollout(f"r{number}", state))

    await store.write(work)
    assert [r.id for r in await store.read(lambda tx: tx.rollouts.page("", 3))] == ["r3", "r2", "r1"]
    assert [r.id for r in await store.read(lambda tx: tx.rollouts.page("r1", 3))] == ["r0"]
    assert [r.id for r in await store.read(lambda tx: tx.rollouts.active())] == ["r1", "r3"]
    await store.write(lambda tx: tx.rollouts.put(rollout("r1", RolloutState.SUCCEEDED)))
    assert [r.id for r in await store.read(lambda tx: tx.rollouts.active())] == ["r3"]
    assert await store.read(lambda tx: tx.rollouts.get("r3")) == rollout("r3", RolloutState.ROLLING_BACK)


async def test_executions_belong_to_their_rollout(store: Store) -> None:
    def work(tx: Transaction) -> None:
        tx.rollouts.put_executions("r1", [Execution(device=BOB, phase=1), Execution(device=ALICE, phase=0)])
        tx.rollouts.put_executions("r2", [Execution(device=ALICE, phase=0)])
        tx.rollouts.put_executions("r1", [Execution(device=BOB, phase=1, state=ExecutionState.NOTIFIED)])
        tx.rollouts.put_executions("r1", [])

    await store.write(work)
    executions = await store.read(lambda tx: tx.rollouts.executions("r1"))
    assert executions == [
        Execution(device=ALICE, phase=0),
        Execution(device=BOB, phase=1, state=ExecutionState.NOTIFIED),
    ]


async def test_tokens_are_found_by_their_hash_until_they_are_removed(store: Store) -> None:
    token = Token(id="t1", role="join", sha256="ab", subject="fleet", created_at=1.0, uses_left=2, labels={"a": "b"})
    other = Token(id="t2", role="admin", sha256="cd", subject="ada", created_at=1.0, expires_at=9.0)

    def work(tx: Transaction) -> None:
        tx.tokens.put(token)
        tx.tokens.put(other)

    await store.write(work)
    assert await store.read(lambda tx: tx.tokens.find("ab")) == token
    assert await store.read(lambda tx: tx.tokens.find("a")) is None
    assert await store.read(lambda tx: [t.id for t in tx.tokens.page("t1", 9)]) == ["t2"]
    await store.write(lambda tx: tx.tokens.remove("t1"))
    assert await store.read(lambda tx: (tx.tokens.get("t1"), tx.tokens.get("t2"))) == (None, other)
    with pytest.raises(Conflict):
        await store.write(
            lambda tx: tx.tokens.put(Token(id="t3", role="join", sha256="cd", subject="", created_at=1.0))
        )


# The journal


async def test_event_numbers_grow_and_are_never_given_twice(store: Store) -> None:
    def append(kind: str) -> Callable[[Transaction], int]:
        return lambda tx: tx.journal.append_event(Event(kind=kind, subject="s", at=1.0, data={"n": [1, {"m": None}]}))

    numbers = [await store.write(append("a")) for _ in range(3)]
    assert numbers == sorted(set(numbers))
    assert [e.seq for e in await store.read(lambda tx: tx.journal.events_after(numbers[0], 9))] == numbers[1:]
    assert await store.write(lambda tx: tx.journal.forget(before=2.0)) == 3
    later = await store.write(append("b"))
    assert later > numbers[-1]
    (event,) = await store.read(lambda tx: tx.journal.events_after(0, 9))
    assert event == Event(kind="b", subject="s", at=1.0, data={"n": [1, {"m": None}]}, seq=later)


async def test_the_audit_log_is_read_newest_first_and_never_forgotten(store: Store) -> None:
    def work(tx: Transaction) -> None:
        for number in range(4):
            tx.journal.append_audit(AuditEntry(at=1.0, actor="ada", action="a", subject="s", detail={"n": number}))

    await store.write(work)
    await store.write(lambda tx: tx.journal.forget(before=99.0))
    newest = await store.read(lambda tx: tx.journal.audit_before(None, 2))
    assert [entry.detail["n"] for entry in newest] == [3, 2]
    older = await store.read(lambda tx: tx.journal.audit_before(newest[-1].seq, 9))
    assert [entry.detail["n"] for entry in older] == [1, 0]


async def test_an_answer_is_kept_for_the_one_who_asked_until_it_is_forgotten(store: Store) -> None:
    answer = StoredResponse(actor="ada", key="k", request_sha256="ab", status=201, body=b"\x00{}", etag='"1"', at=5.0)
    await store.write(lambda tx: tx.journal.put_response(answer))
    assert await store.read(lambda tx: tx.journal.response("ada", "k")) == answer
    assert await store.read(lambda tx: tx.journal.response("bob", "k")) is None
    assert await store.write(lambda tx: tx.journal.forget(before=5.0)) == 0
    assert await store.write(lambda tx: tx.journal.forget(before=6.0)) == 1
    assert await store.read(lambda tx: tx.journal.response("ada", "k")) is None


# Telemetry


async def test_a_window_that_comes_twice_counts_once(store: Store) -> None:
    await store.write(lambda tx: tx.telemetry.add(ALICE, [window(0), window(10, errors=2)]))
    await store.write(lambda tx: tx.telemetry.add(ALICE, [window(10, errors=2), window(20)]))
    totals = await store.read(lambda tx: tx.telemetry.totals(ReleaseRef(DETECTOR, Version("1")), 0.0))
    assert totals == ReleaseTotals(
        devices=1,
        requests=30,
        errors=2,
        latency_counts=tuple(3 * count for count in range(BUCKETS)),
        latency_sum_s=1.5,
        queue_counts=tuple(3 * count for count in reversed(range(BUCKETS))),
        queue_sum_s=0.75,
        queue_max_s=0.125,
        run_counts=(9, *(0,) * 6, 3),
        run_rows=300,
        run_sum_s=3.0,
        refused=3,
        expired=6,
        cancelled=9,
        labelled=12,
        correct=6,
    )


async def test_totals_are_of_one_release_since_a_moment_and_of_some_devices(store: Store) -> None:
    one = ReleaseRef(DETECTOR, Version("1"))

    def work(tx: Transaction) -> None:
        tx.telemetry.add(ALICE, [window(0), window(10), window(10, version="2")])
        tx.telemetry.add(BOB, [window(10)])
        tx.telemetry.add(CAROL, [window(10)])

    await store.write(work)

    async def totals(since: float, devices: list[DeviceId] | None) -> tuple[int, int]:
        sums = await store.read(lambda tx: tx.telemetry.totals(one, since, devices))
        return sums.devices, sums.requests

    assert await totals(0, None) == (3, 40)
    assert await totals(20, None) == (3, 30)
    assert await totals(20, [ALICE, BOB, BOB]) == (2, 20)
    assert await totals(0, []) == (0, 0)
    assert await totals(0, [*(DeviceId(f"other-{number}") for number in range(3000)), ALICE]) == (1, 20)
    nothing = await store.read(lambda tx: tx.telemetry.totals(ReleaseRef(DETECTOR, Version("9")), 0))
    assert nothing.latency_counts == (0,) * BUCKETS


async def test_old_windows_are_forgotten(store: Store) -> None:
    await store.write(lambda tx: tx.telemetry.add(ALICE, [window(0), window(10)]))
    assert await store.write(lambda tx: tx.telemetry.forget(before=20.0)) == 1
    sums = await store.read(lambda tx: tx.telemetry.totals(ReleaseRef(DETECTOR, Version("1")), 0))
    assert sums.requests == 10


def device_window(started_at: float, cpu_s: float = 1.0, rss_bytes: int = 100, lost: int = 0) -> DeviceWindow:
    return DeviceWindow(
        started_at=started_at,
        ended_at=started_at + 10,
        cpu_s=cpu_s,
        rss_bytes=rss_bytes,
        windows_lost=lost,
        files_bad=1,
        files_mended=1,
    )


async def test_what_agents_used_is_that_of_windows_in_which_the_release_was_asked(store: Store) -> None:
    one = ReleaseRef(DETECTOR, Version("1"))
    idle = device_window(20, cpu_s=50.0, rss_bytes=900)

    def work(tx: Transaction) -> None:
        tx.telemetry.add(ALICE, [window(0), window(10)], [device_window(0), device_window(10, lost=3), idle])
        tx.telemetry.add(ALICE, [window(10)], [device_window(10, lost=3)])
        tx.telemetry.add(BOB, [window(0, version="2")], [device_window(0, cpu_s=7.0)])
        tx.telemetry.add(CAROL, [window(10)], [device_window(10, cpu_s=2.0, rss_bytes=300, lost=4)])

    await store.write(work)
    used = await store.read(lambda tx: tx.telemetry.usage(one, 0.0))
    assert used == DeviceTotals(
        devices=2,
        seconds=30.0,
        cpu_s=4.0,
        rss_bytes_max=300,
        pss_bytes_max=0,
        windows_lost=7,
        files_bad=3,
        files_mended=3,
    )
    assert (await store.read(lambda tx: tx.telemetry.usage(one, 0.0, [ALICE]))).windows_lost == 3
    assert (await store.read(lambda tx: tx.telemetry.usage(one, 15.0))).seconds == 20.0
    nothing = await store.read(lambda tx: tx.telemetry.usage(one, 0.0, []))
    assert (nothing.devices, nothing.cpu_s, nothing.rss_bytes_max) == (0, 0, 0)


async def test_sketches_add_up_over_windows_and_devices_and_count_once(store: Store) -> None:
    one, name = ReleaseRef(DETECTOR, Version("1")), blob("reference").digest
    first, second = window(0, sketch=sketch_of(1, 2, low=-1.0)), window(10, sketch=sketch_of(10, 20, low=-3.0))
    late = window(1000, sketch=sketch_of(100, 200))
    await store.write(lambda tx: tx.telemetry.add(ALICE, [first, window(20)]))
    for _ in range(2):
        await store.write(lambda tx: tx.telemetry.add(ALICE, [first, second, late]))
    await store.write(lambda tx: tx.telemetry.add(BOB, [first, window(10, version="2", sketch=sketch_of(5, 5))]))

    async def counts(since: float, devices: list[DeviceId] | None = None) -> tuple[int, tuple[int, ...], float | None]:
        found = (await store.read(lambda tx: tx.telemetry.sketches(one, since, devices)))[name]
        return found.observations, found.features[0].counts, found.features[0].low

    assert await counts(0.0) == (4, (112, 224), -3.0)
    assert await counts(0.0, [BOB]) == (1, (1, 2), -1.0)
    assert await counts(900.0) == (1, (100, 200), None)
    assert await store.read(lambda tx: tx.telemetry.sketches(one, 0.0, [CAROL])) == {}
    assert await store.write(lambda tx: tx.telemetry.forget(before=100.0)) == 5
    assert await counts(0.0) == (1, (100, 200), None)


async def test_a_reference_is_kept_under_its_digest(store: Store) -> None:
    feature = Classes(tensor="y", side="output", classes=(1, 2), counts=(5, 6, 7))
    reference = Reference(observations=9, features=(feature,))
    name = blob("reference").digest
    await store.write(lambda tx: tx.telemetry.put_reference(name, encode_reference(reference)))
    await store.write(lambda tx: tx.telemetry.put_reference(name, encode_reference(reference)))
    assert await store.read(lambda tx: tx.telemetry.reference(name)) == reference
    assert await store.read(lambda tx: tx.telemetry.reference(blob("other").digest)) is None


def finding(device: str = "alice", *, file: str = "int8", at: float = 1.0, **changes: object) -> FoundVariant:
    plain = FoundVariant(
        artifact=blob(file).digest,
        device_class="aarch64, 4 CPUs",
        device=DeviceId(device),
        release=ReleaseRef(DETECTOR, Version("1")),
        at=at,
        run_s=0.25,
    )
    return replace(plain, **changes)


def put_finding(tx: Transaction, found: FoundVariant) -> None:
    tx.findings.put(found)


async def test_what_devices_found_of_a_file_comes_back_by_class_and_device(store: Store) -> None:
    other = finding("alice", file="fp16")
    known = [
        finding("bob", device_class="a", run_s=0.5),
        finding("carol", device_class="a", run_s=None, failed=True),
        finding("alice", device_class="b"),
    ]

    for one in (other, *reversed(known)):
        await store.write(partial(put_finding, found=one))

    assert await store.read(lambda tx: tx.findings.of(blob("int8").digest)) == known
    assert await store.read(lambda tx: tx.findings.of(blob("fp16").digest)) == [other]
    assert await store.read(lambda tx: tx.findings.of(blob("none").digest)) == []


async def test_a_device_has_one_finding_of_a_file_its_newest_that_says_something(store: Store) -> None:
    upgraded = finding(device_class="aarch64, newer runtime", at=2, run_s=0.125)
    silent = finding(at=3, run_s=None)
    failed = finding(at=4, run_s=None, failed=True)

    async def known() -> list[FoundVariant]:
        return await store.read(lambda tx: tx.findings.of(blob("int8").digest))

    await store.write(lambda tx: tx.findings.put(silent))
    assert await known() == [silent]
    await store.write(lambda tx: tx.findings.put(finding()))
    await store.write(lambda tx: tx.findings.put(upgraded))
    await store.write(lambda tx: tx.findings.put(silent))
    assert await known() == [upgraded]
    await store.write(lambda tx: tx.findings.put(failed))
    assert await known() == [failed]


async def test_findings_of_a_class_and_of_a_file_are_bounded_and_the_newest_stay(store: Store) -> None:
    def fill(tx: Transaction) -> None:
        for number in range(DEVICES_PER_CLASS_MAX + 5):
            tx.findings.put(finding(f"d{number:04}", at=number))

    def crowd(tx: Transaction) -> None:
        for number in range(FINDINGS_PER_FILE_MAX + 5):
            tx.findings.put(finding(f"d{number:04}", file="big", at=number, device_class=f"c{number}"))

    await store.write(fill)
    kept = await store.read(lambda tx: tx.findings.of(blob("int8").digest))
    assert [one.at for one in kept] == list(range(5, DEVICES_PER_CLASS_MAX + 5))

    await store.write(crowd)
    kept = await store.read(lambda tx: tx.findings.of(blob("big").digest))
    assert len(kept) == FINDINGS_PER_FILE_MAX
    assert min(one.at for one in kept) == 5
    assert len(await store.read(lambda tx: tx.findings.of(blob("int8").digest))) == DEVICES_PER_CLASS_MAX
