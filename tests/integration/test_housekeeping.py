"""What the controller does now and then, over a real store and a clock that the test turns."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.artifact.digest import digest_of
from common.errors import Unavailable
from common.ids import DeviceId
from controller.background import Background
from controller.devices import PRESENCE_TIMEOUT_S, Device
from controller.housekeeping import Fleet, Forgetting, Republisher
from controller.store.port import AuditEntry, Event, Order, Store, Transaction
from controller.store.sql import open_store
from tests.conftest import eventually


class TurnedClock:
    """Shows what it was set to."""

    time = 1_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
async def store(tmp_path: Path, clock: TurnedClock) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite:///{tmp_path / 'controller.db'}", clock)
    yield store
    await store.close()


def device(name: str, last_seen: float | None, connected: bool = True) -> Device:
    return Device(id=DeviceId(name), created_at=0.0, connected=connected, last_seen=last_seen)


async def put(store: Store, *devices: Device) -> None:
    def write(tx: Transaction) -> None:
        for each in devices:
            tx.devices.put(each)

    await store.write(write)


async def told(store: Store) -> list[tuple[str, str]]:
    events = await store.read(lambda tx: tx.journal.events_after(0, 100))
    return [(event.kind, event.subject) for event in events]


async def test_a_device_that_falls_silent_is_told_of_once_and_when_it_is_back(store: Store, clock: TurnedClock) -> None:
    seen: list[dict[str, int]] = []
    fleet = Fleet(store, clock, lambda counts, _rollouts: seen.append(dict(counts)))
    await put(store, device("d1", clock.time), device("d2", clock.time), device("d3", None, connected=False))
    await fleet.look()
    assert (await told(store), seen[-1]) == ([], {"online": 2, "offline": 0, "never_seen": 1})

    clock.time += PRESENCE_TIMEOUT_S + 1
    await put(store, device("d2", clock.time))
    await fleet.look()
    await fleet.look()
    assert (await told(store), seen[-1]) == (
        [("device.offline", "d1")],
        {"online": 1, "offline": 1, "never_seen": 1},
    )

    await put(store, device("d1", clock.time))
    await fleet.look()
    assert await told(store) == [("device.offline", "d1"), ("device.online", "d1")]


async def test_a_silent_device_whose_death_is_known_is_not_called_back_to_life(
    store: Store, clock: TurnedClock
) -> None:
    fleet = Fleet(store, clock, lambda _counts, _rollouts: None)
    await put(store, device("d1", clock.time - PRESENCE_TIMEOUT_S - 1))
    await fleet.look()
    await put(store, device("d1", clock.time - PRESENCE_TIMEOUT_S - 1, connected=False))
    await fleet.look()
    assert await told(store) == [("device.offline", "d1")]


async def test_old_events_are_forgotten_and_the_audit_log_is_not(store: Store, clock: TurnedClock) -> None:
    def write(tx: Transaction) -> None:
        for at in (clock.time - 100, clock.time):
            tx.journal.append_event(Event(kind="k", subject="s", at=at))
            tx.journal.append_audit(AuditEntry(at=at, actor="a", action="b", subject="c"))

    await store.write(write)
    await Forgetting(store, clock, events_kept_s=50, telemetry_kept_s=50).forget()
    assert len(await told(store)) == 1
    assert len(await store.read(lambda tx: tx.journal.audit_before(None, 10))) == 2


async def test_every_order_is_given_again_even_if_the_broker_goes_away_meanwhile(
    store: Store, clock: TurnedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.housekeeping.RETRY_S", 0.01)
    monkeypatch.setattr("controller.housekeeping.DEVICES_PER_READ", 2)
    names = [DeviceId(f"d{number}") for number in range(5)]

    def write(tx: Transaction) -> None:
        for name in names:
            tx.devices.put(device(name, None))
            if name != "d1":
                etag = digest_of(name.encode())
                tx.orders.put(Order(device=name, generation=1, etag=etag, envelope=b"{}", created_at=0, published=True))

    await store.write(write)
    given: Counter[str] = Counter()
    refusals = [Unavailable("away")] * 2

    async def publish(order: Order) -> None:
        if order.device == "d3" and refusals:
            raise refusals.pop()
        given[order.device] += 1

    republisher = Republisher(store, publish)
    running = asyncio.create_task(republisher.run())
    republisher.request()
    await eventually(lambda: given["d4"], "the last order")
    running.cancel()
    assert set(given) == {"d0", "d2", "d3", "d4"}


async def test_a_loop_that_dies_is_started_again_and_its_trouble_is_shown() -> None:
    background = Background(uniform=lambda: 0.0)
    runs: list[int] = []

    async def loop() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise RuntimeError("a mistake")
        await asyncio.sleep(600)

    background.keep_running("loop", loop)
    assert background.health() == {"loop": "ok"}
    await eventually(lambda: len(runs) == 3, "the third run")
    assert background.health() == {"loop": "failed: RuntimeError"}
    await background.stop()
    assert len(runs) == 3
