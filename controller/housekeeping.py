"""What the controller does now and then: look how the fleet is, forget what is old, complete what the broker retains.

Presence is a function of time (`controller.devices`), so nobody is told when a device falls silent without a death.
`Fleet.look` compares with what it saw last time and says so in events: `device.offline` with reason `silent`, and
`device.online` when such a device is heard again. What it saw lives in memory only: after a restart a device that was
silent all the time is reported once more.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from common.clock import Clock
from common.errors import Unavailable
from common.ids import DeviceId
from controller.devices import Device, Presence, presence
from controller.store.port import Event, Order, Store, Transaction

LOOK_S = 5.0
FORGET_S = 3600.0
DEVICES_PER_READ = 500
PUBLISHES_AT_ONCE_MAX = 32
RETRY_S = 2.0

_log = logging.getLogger(__name__)


class Fleet:
    """Follows the presence of all devices. `seen(counts by presence, active rollouts)` takes the figures."""

    def __init__(self, store: Store, clock: Clock, seen: Callable[[Counter[str], int], object]) -> None:
        self._store = store
        self._clock = clock
        self._seen = seen
        self._silent: frozenset[DeviceId] = frozenset()

    async def run(self) -> None:
        """Look every `LOOK_S` seconds, until cancelled."""
        while True:
            try:
                await self.look()
            except Unavailable as error:
                _log.warning("cannot look at the fleet: %s", error)
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """One look: figures, and events about who fell silent or came back."""
        now = self._clock.now()
        counts: Counter[str] = Counter({kind.value: 0 for kind in Presence})
        silent: set[DeviceId] = set()
        async for page in fleet_pages(self._store):
            states = [(device, presence(device, now)) for device in page]
            counts.update(state.value for _, state in states)
            silent.update(device.id for device, state in states if device.connected and state is Presence.OFFLINE)
        before, self._silent = self._silent, frozenset(silent)
        if self._silent != before:
            await self._store.write(lambda tx: _tell(tx, before, self._silent, now))
        self._seen(counts, await self._store.read(lambda tx: len(tx.rollouts.active())))


def _tell(tx: Transaction, before: frozenset[DeviceId], silent: frozenset[DeviceId], now: float) -> None:
    for device in sorted(silent - before):
        tx.journal.append_event(Event(kind="device.offline", subject=device, at=now, data={"reason": "silent"}))
    for device in sorted(before - silent):
        known = tx.devices.get(device)
        if known is not None and known.connected:  # otherwise its death has been told of
            tx.journal.append_event(Event(kind="device.online", subject=device, at=now, data={"reason": "heard again"}))


class Forgetting:
    """Drops what is older than it is kept, every `FORGET_S` seconds."""

    def __init__(self, store: Store, clock: Clock, *, events_kept_s: float, telemetry_kept_s: float) -> None:
        self._store = store
        self._clock = clock
        self._events_kept_s = events_kept_s
        self._telemetry_kept_s = telemetry_kept_s

    async def run(self) -> None:
        """Forget now and then, until cancelled."""
        while True:
            try:
                await self.forget()
            except Unavailable as error:
                _log.warning("cannot forget old records: %s", error)
            await asyncio.sleep(FORGET_S)

    async def forget(self) -> None:
        """Drop old events, stored responses and telemetry; the audit log stays."""
        now = self._clock.now()
        events = await self._store.write(lambda tx: tx.journal.forget(now - self._events_kept_s))
        windows = await self._store.write(lambda tx: tx.telemetry.forget(now - self._telemetry_kept_s))
        if events or windows:
            _log.info("forgot old records", extra={"events": events, "telemetry_windows": windows})


class Republisher:
    """Gives the broker every device's newest order when it may have lost what it retained.

    That is when the broker began a new session for us, and after a start (a power cut can cost an embedded broker its
    last second). A device knows an order that it has already by its generation, so sending one again does no harm.
    """

    def __init__(self, store: Store, publish: Callable[[Order], Awaitable[None]]) -> None:
        self._store = store
        self._publish = publish
        self._due = asyncio.Event()

    def request(self) -> None:
        """Begin soon."""
        self._due.set()

    async def run(self) -> None:
        """Republish whenever it was requested, until cancelled; a broker that goes away meanwhile is tried again."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                count = await self._republish()
                _log.info("gave the broker every order again", extra={"orders": count})
            except Unavailable as error:
                _log.info("republishing orders waits: %s", error)
                self._due.set()
                await asyncio.sleep(RETRY_S)

    async def _republish(self) -> int:
        turn = asyncio.Semaphore(PUBLISHES_AT_ONCE_MAX)
        count = 0
        async for devices in fleet_pages(self._store):
            orders = await self._store.read(partial(_orders_of, devices=devices))
            await asyncio.gather(*(self._publish_one(order, turn) for order in orders))
            count += len(orders)
        return count

    async def _publish_one(self, order: Order, turn: asyncio.Semaphore) -> None:
        async with turn:
            await self._publish(order)


async def fleet_pages(store: Store) -> AsyncIterator[list[Device]]:
    """All devices, some at a time, each page from a snapshot of its own."""
    after = ""
    while page := await store.read(partial(_page_after, after=after)):
        yield page
        after = page[-1].id


def _page_after(tx: Transaction, after: str) -> list[Device]:
    return tx.devices.page(after, DEVICES_PER_READ)


def _orders_of(tx: Transaction, devices: list[Device]) -> list[Order]:
    return [order for device in devices if (order := tx.orders.get(device.id)) is not None]
