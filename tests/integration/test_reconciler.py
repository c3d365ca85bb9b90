"""The reconciler over the real SQLite store: a simulated fleet follows what is really published.

`publish` hands orders to the fleet and can be told to fail; the controller is "killed" by dropping the reconciler, and
a new one goes on over the same database file.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace import TracerProvider

from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of
from common.backoff import Backoff
from common.clock import SystemClock
from common.delta import CODECS
from common.errors import Unavailable
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.observability import traceparent_of
from common.trust import Signer, verify
from common.wire import DesiredState, Shadow, Split, decode
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from controller.devices import Device
from controller.intake import apply_heartbeat, apply_presence, apply_reported
from controller.operations import act_on_rollout, create_rollout, preview_rollout
from controller.orders import decode_order
from controller.reconciler import Reconciler, first_order
from controller.rollouts.model import (
    ExecutionState,
    PhaseSpec,
    Rollout,
    RolloutSpec,
    RolloutState,
    ShadowSpec,
    SplitSpec,
)
from controller.store.port import Order, Patch, Release, Transaction
from controller.store.sql import SqlStore, open_store
from tests.simulation.device import CAPABILITIES, WAITS, Flaw, SimulatedDevice

MODEL = ModelName("m")
V1, V2 = Version("1"), Version("2")
DEVICES = [DeviceId(f"d{number}") for number in range(6)]
SIGNER = Signer.generate()
PASSES_MAX = 200


class SteppingClock:
    """Wall time that the test moves."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


class Harbour:
    """The store, the fleet, and what the broker was given. `trouble` makes `publish` raise that many times."""

    def __init__(self, store: SqlStore, clock: SteppingClock, flaws: dict[Version, Flaw]) -> None:
        self.store = store
        self.clock = clock
        self.fleet = {name: SimulatedDevice(name, flaws) for name in DEVICES}
        self.published: list[Order] = []
        self.retained: dict[DeviceId, DesiredState] = {}
        self.trouble = 0
        self.away: set[DeviceId] = set()
        self.reconciler = self.new_reconciler()

    def new_reconciler(self) -> Reconciler:
        return Reconciler(self.store, self.publish, SIGNER, self.clock, backoff=Backoff(base_s=0.0, cap_s=0.0))

    async def publish(self, order: Order) -> None:
        if self.trouble:
            self.trouble -= 1
            raise Unavailable("the broker is away")
        payload = verify(order.envelope, DESIRED_PAYLOAD_TYPE, (SIGNER.public_key,))
        self.published.append(order)
        self.retained[order.device] = decode(payload, DesiredState)

    async def prepare(self) -> None:
        """Two releases; a fleet that runs the first."""
        await self.store.write(lambda tx: _publish(tx, (V1, V2), self.clock.now()))
        await self.store.write(lambda tx: _join(tx, {MODEL: V1}, self.clock.now()))
        await self.store.write(lambda tx: _connect(tx, self.fleet.values(), self.clock.now()))

    async def create(self, **changes: object) -> str:
        spec = replace(
            RolloutSpec(release=ReleaseRef(MODEL, V2), bake_s=2, silence_s=1000, straggler_s=1000), **changes
        )
        now = self.clock.now()
        rollout = await self.store.write(
            lambda tx: create_rollout(tx, spec, id="r1", salt="s", actor="test", now=now, traceparent=traceparent_of())
        )
        return rollout.id

    async def turn(self) -> None:
        """A second passes: one pass of the reconciler, and every device takes a step and reports."""
        await self.reconciler.reconcile()
        self.clock.time += 1
        for device in self._present():
            if device.id in self.retained:
                device.follow(self.retained[device.id])
            device.step(self.clock.now())
        await self.store.write(self.hear_fleet)

    async def until(self, *states: RolloutState, crash_after: tuple[int, ...] = ()) -> Rollout:
        for number in range(PASSES_MAX):
            if number in crash_after:
                self.reconciler = self.new_reconciler()
            await self.turn()
            rollout = await self.rollout()
            if rollout.state in states:
                return rollout
        pytest.fail(f"still {rollout.state}: {rollout.reason}")

    async def rollout(self) -> Rollout:
        rollout = await self.store.read(lambda tx: tx.rollouts.get("r1"))
        assert rollout is not None
        return rollout

    async def states(self) -> dict[DeviceId, ExecutionState]:
        executions = await self.store.read(lambda tx: tx.rollouts.executions("r1"))
        return {execution.device: execution.state for execution in executions}

    def hear_fleet(self, tx: Transaction) -> None:
        now = self.clock.now()
        for device in self._present():
            apply_heartbeat(tx, device.id, device.heartbeat(now), now)
            apply_reported(tx, device.id, device.report(now), now)
        for patch in tx.patches.pending(100):
            tx.patches.put(replace(patch, state="not_worth"))

    def orders_of(self, version: Version) -> list[DesiredState]:
        """Everything that was published and names this version."""
        orders = map(decode_order, self.published)
        return [order for order in orders if any(model.version == version for model in order.models)]

    def _present(self) -> list[SimulatedDevice]:
        return [device for device in self.fleet.values() if device.id not in self.away]


def ready_patch(base: Version, target: Version, patch: ArtifactRef) -> Patch:
    old, new = (digest_of(version.encode()) for version in (base, target))
    return Patch(base=old, target=new, codec=CODECS[0], state="ready", created_at=0, patch=patch)


def _publish(tx: Transaction, versions: Iterable[Version], now: float) -> None:
    for version in versions:
        artifact = ArtifactRef(digest_of(version.encode()), 1000)
        envelope = ArtifactRef(digest_of(b"manifest" + version.encode()), 300)
        manifest = ReleaseManifest(MODEL, version, {"default": Variant({"model.onnx": artifact}, "model.onnx", (), ())})
        for reference in (artifact, envelope):
            tx.artifacts.put(reference, now)
        ref = ReleaseRef(MODEL, version)
        tx.releases.add(Release(ref=ref, manifest=manifest, envelope=envelope, published_at=now, published_by="test"))


def _join(tx: Transaction, assigned: dict[ModelName, Version], now: float) -> None:
    for name in DEVICES:
        device = Device(id=name, created_at=now, assigned=assigned, capabilities=CAPABILITIES)
        first_order(tx, device, SIGNER, now)


def _connect(tx: Transaction, devices: Iterable[SimulatedDevice], now: float) -> None:
    for device in devices:
        order = tx.orders.get(device.id)
        assert order is not None
        device.follow(decode_order(order))
        while device.target is not None:
            device.step(now)
        apply_presence(tx, device.id, device.birth(now), now)
        apply_reported(tx, device.id, device.report(now), now)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    store = await open_store(f"sqlite:///{tmp_path}/fleet.db", SystemClock())
    yield store
    await store.close()


async def harbour(store: SqlStore, flaws: dict[Version, Flaw] | None = None) -> Harbour:
    harbour = Harbour(store, SteppingClock(), flaws or {})
    await harbour.prepare()
    return harbour


PHASES = (PhaseSpec(percent=20), PhaseSpec(percent=100))


async def test_a_rollout_reaches_every_device_phase_by_phase(store: SqlStore) -> None:
    world = await harbour(store)
    await world.create(phases=PHASES)
    rollout = await world.until(RolloutState.SUCCEEDED)
    assert set((await world.states()).values()) == {ExecutionState.SUCCEEDED}
    assert all(device.running == V2 for device in world.fleet.values())
    first, second = rollout.phases
    assert first.finished_at is not None
    assert second.started_at is not None
    assert first.finished_at <= second.started_at


async def test_every_change_is_an_event(store: SqlStore) -> None:
    world = await harbour(store)
    await world.create()
    await world.until(RolloutState.SUCCEEDED)
    events = await store.read(lambda tx: tx.journal.events_after(0, 1000))
    kinds = {event.kind for event in events}
    assert kinds >= {"rollout.created", "rollout.updated", "execution.updated", "device.online", "update.finished"}
    last = [event for event in events if event.kind == "rollout.updated"][-1]
    assert last.data["state"] == "succeeded"


async def test_orders_wait_for_a_broker_that_is_away(store: SqlStore) -> None:
    world = await harbour(store)
    world.trouble = 40
    await world.create()
    await world.until(RolloutState.SUCCEEDED)
    assert not await store.read(lambda tx: tx.orders.unpublished(100))


@pytest.mark.parametrize("crash_after", [(1,), (2,), (3, 4, 5), (6, 9)])
async def test_a_controller_that_is_killed_ends_in_the_same_state(
    store: SqlStore, crash_after: tuple[int, ...]
) -> None:
    world = await harbour(store)
    await world.create(phases=PHASES)
    rollout = await world.until(RolloutState.SUCCEEDED, crash_after=crash_after)
    assert rollout.state is RolloutState.SUCCEEDED
    assert set((await world.states()).values()) == {ExecutionState.SUCCEEDED}
    assert all(device.generation == 2 for device in world.fleet.values()), "nobody was ordered twice"


async def test_an_order_that_was_committed_and_not_sent_is_sent_after_a_crash(store: SqlStore) -> None:
    world = await harbour(store)
    await world.create()

    async def dies(order: Order) -> None:
        if order.generation == 2:
            raise asyncio.CancelledError
        await world.publish(order)

    world.reconciler = Reconciler(store, dies, SIGNER, world.clock)
    with pytest.raises(asyncio.CancelledError):
        await world.until(RolloutState.SUCCEEDED)
    assert set((await world.states()).values()) == {ExecutionState.NOTIFIED}
    assert all(order.generation == 1 for order in world.published)
    world.reconciler = world.new_reconciler()
    await world.until(RolloutState.SUCCEEDED)
    assert {order.device for order in world.published if order.generation == 2} == set(DEVICES)


async def test_a_bad_release_is_taken_back_from_its_first_phase(store: SqlStore) -> None:
    world = await harbour(store, {V2: Flaw.UNHEALTHY})
    await world.create(phases=PHASES)
    rollout = await world.until(RolloutState.ROLLED_BACK, crash_after=(4, 8))
    states = await world.states()
    assert list(states.values()).count(ExecutionState.CANCELED) == 4
    assert list(states.values()).count(ExecutionState.ROLLED_BACK) == 2
    assert "failed in phase 1" in rollout.reason
    assert all(device.running == V1 for device in world.fleet.values())
    devices = await store.read(lambda tx: list(tx.devices.all()))
    assert all(device.assigned == {MODEL: V1} for device in devices)


async def test_a_rollback_of_a_first_release_takes_the_model_out_of_service(store: SqlStore) -> None:
    world = Harbour(store, SteppingClock(), {V2: Flaw.UNHEALTHY})
    now = world.clock.now()
    await store.write(lambda tx: _publish(tx, (V2,), now))
    await store.write(lambda tx: _join(tx, {}, now))
    await store.write(lambda tx: _connect(tx, world.fleet.values(), now))
    await world.create()
    await world.until(RolloutState.ROLLED_BACK)
    assert all(device.entry is None for device in world.fleet.values())


async def test_devices_wait_for_patches_that_could_serve_them(store: SqlStore) -> None:
    world = await harbour(store)
    await world.create()
    await world.reconciler.reconcile()
    pending = await store.read(lambda tx: tx.patches.pending(10))
    assert [(patch.base, patch.target) for patch in pending] == [(digest_of(b"1"), digest_of(b"2"))]
    for _ in range(3):
        await world.reconciler.reconcile()
    assert (await world.rollout()).state is RolloutState.PREPARING
    ready = ArtifactRef(digest_of(b"patch"), 10)

    def build(tx: Transaction) -> None:
        tx.artifacts.put(ready, 0)
        tx.patches.put(replace(pending[0], state="ready", patch=ready))

    await store.write(build)
    await world.reconciler.reconcile()
    (offer,) = decode_order(world.published[-1]).models[0].files[0].patches
    assert (offer.base, offer.patch, offer.codec) == (digest_of(b"1"), ready, CODECS[0])


async def test_devices_that_would_exceed_their_budget_wait_until_there_is_a_cheaper_way(store: SqlStore) -> None:
    world = await harbour(store)
    spec = RolloutSpec(release=ReleaseRef(MODEL, V2), max_bytes=500)
    preview = await store.read(lambda tx: preview_rollout(tx, spec, salt="s", now=world.clock.now()))
    assert [phase.over_budget for phase in preview.phases] == [len(DEVICES)]
    await world.create(max_bytes=500)
    for _ in range(10):
        await world.turn()
    assert (await world.rollout()).state is RolloutState.RUNNING
    executions = await store.read(lambda tx: tx.rollouts.executions("r1"))
    assert {(one.state, one.detail) for one in executions} == {(ExecutionState.IN_PROGRESS, WAITS)}
    assert len(world.orders_of(V2)) == len(DEVICES), "they were told once, while there was nothing new to say"

    patch = ArtifactRef(digest_of(b"patch"), 150)
    await store.write(lambda tx: tx.artifacts.put(patch, 0))
    await store.write(lambda tx: tx.patches.put(ready_patch(V1, V2, patch)))
    await world.until(RolloutState.SUCCEEDED)
    assert all(device.running == V2 for device in world.fleet.values())
    assert len(world.orders_of(V2)) == 2 * len(DEVICES)
    assert len({(order.device, order.models[0].order) for order in world.orders_of(V2)}) == len(DEVICES)


async def test_devices_that_may_not_wait_fail_when_they_would_exceed_their_budget(store: SqlStore) -> None:
    world = await harbour(store)
    await world.create(max_bytes=500, on_exceed="fail", phases=PHASES)
    rollout = await world.until(RolloutState.ROLLED_BACK)
    assert "over_budget" in rollout.reason
    assert all(device.running == V1 for device in world.fleet.values())


async def test_a_release_is_compared_and_shared_on_its_way_in_and_what_it_replaced_is_not_on_its_way_back(
    store: SqlStore,
) -> None:
    world = await harbour(store)
    terms = {"shadow": ShadowSpec(for_s=60), "split": SplitSpec(share=0.1)}
    await world.create(max_bytes=500, on_exceed="fail", phases=PHASES, **terms)
    await world.until(RolloutState.ROLLED_BACK)
    there, back = world.orders_of(V2), world.orders_of(V1)
    assert there
    for order in there:
        assert order.models[0].shadow == Shadow(for_s=60)
        assert order.models[0].split == Split(share=0.1)
    late = [order for order in back if order.generation > min(one.generation for one in there)]
    assert late
    assert not any(order.models[0].shadow or order.models[0].split for order in late)


async def test_a_preview_counts_devices_and_bytes_and_writes_nothing(store: SqlStore) -> None:
    world = await harbour(store)
    spec = RolloutSpec(release=ReleaseRef(MODEL, V2), phases=PHASES)
    preview = await store.read(lambda tx: preview_rollout(tx, spec, salt="s", now=world.clock.now()))
    assert [phase.devices for phase in preview.phases] == [2, 4]
    assert preview.online == 6
    assert preview.bytes == preview.full_bytes == 6000
    assert [phase.undecided for phase in preview.phases] == [2, 4]


async def test_a_person_pauses_and_resumes(store: SqlStore) -> None:
    world = await harbour(store)
    name = await world.create(phases=PHASES)
    for _ in range(3):
        await world.turn()
    await store.write(lambda tx: act_on_rollout(tx, name, "pause", now=world.clock.now()))
    for _ in range(20):
        await world.turn()
    assert list((await world.states()).values()).count(ExecutionState.QUEUED) == 4
    await store.write(lambda tx: act_on_rollout(tx, name, "resume", now=world.clock.now()))
    await world.until(RolloutState.SUCCEEDED)


async def test_a_device_that_comes_back_after_the_end_is_still_heard(store: SqlStore) -> None:
    world = await harbour(store)
    late = world.fleet[DEVICES[0]]
    world.away.add(late.id)
    await world.create(straggler_s=5)
    await world.until(RolloutState.SUCCEEDED)
    assert (await world.states())[late.id] is ExecutionState.NOTIFIED
    world.away.clear()
    for _ in range(30):
        await world.turn()
    assert (await world.states())[late.id] is ExecutionState.SUCCEEDED
    assert late.running == V2


async def test_a_device_that_was_away_during_a_rollback_goes_back_later(store: SqlStore) -> None:
    world = await harbour(store, {V2: Flaw.UNHEALTHY})
    late = world.fleet[DEVICES[0]]
    await world.create()
    while (await world.states())[late.id] is ExecutionState.QUEUED:
        await world.turn()
    world.away.add(late.id)
    await store.write(lambda tx: apply_presence(tx, late.id, late.death(0), world.clock.now()))
    rollout = await world.until(RolloutState.ROLLED_BACK)
    assert "1 unreachable" in rollout.reason
    assert (await world.states())[late.id] is ExecutionState.REVERTING
    world.away.clear()
    await store.write(lambda tx: apply_presence(tx, late.id, late.birth(0), world.clock.now()))
    for _ in range(30):
        await world.turn()
    assert (await world.states())[late.id] is ExecutionState.ROLLED_BACK
    assert late.running == V1


async def test_an_order_continues_the_trace_of_its_rollout(store: SqlStore) -> None:
    world = await harbour(store)
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("create") as span:
        await world.create()
    trace_id = format(span.get_span_context().trace_id, "032x")
    await world.until(RolloutState.SUCCEEDED)
    orders = [decode_order(order) for order in world.published if order.generation == 2]
    assert orders
    assert {(order.traceparent or "").split("-")[1] for order in orders} == {trace_id}


async def test_the_loop_runs_when_nudged_and_stops(store: SqlStore) -> None:
    world = await harbour(store)
    reconciler = Reconciler(store, world.publish, SIGNER, SystemClock(), interval_s=3600)
    running = asyncio.create_task(reconciler.run())
    await world.create()
    async with asyncio.timeout(20):
        while len({order.device for order in world.published if order.generation == 2}) < len(DEVICES):
            await store.write(world.hear_fleet)
            reconciler.nudge()
            await asyncio.sleep(0.01)
        reconciler.stop()
        await running


async def test_the_loop_ends_when_it_is_cancelled_in_the_moment_of_a_nudge(store: SqlStore) -> None:
    world = await harbour(store)
    for _ in range(5):
        reconciler = Reconciler(store, world.publish, SIGNER, SystemClock(), interval_s=3600)
        running = asyncio.create_task(reconciler.run())
        await asyncio.sleep(0.1)  # long enough to be waiting for a nudge; if not, the cancellation is noticed anyway
        reconciler.nudge()
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=10)
        reconciler.stop()
        assert done, "the nudge swallowed the cancellation"
