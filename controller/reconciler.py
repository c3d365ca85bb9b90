"""The loop that makes the fleet follow its rollouts: load, plan, commit, dispatch.

Each step of a rollout is one transaction that loads a snapshot, plans, and stores the decision together with the orders
it takes, signed and marked unpublished. Dispatch sends unpublished orders and marks them once the broker has them.
So the loop may be killed anywhere: what was not committed is planned again, what was committed and not sent is sent
after the restart, what was sent and not marked is sent twice, and a device knows an order it has by its generation.

The planner judges silence, so the loop must know whether it can hear: tell it with `hears(False)` when the link to the
broker is lost and `hears(True)` when it is back. It decides nothing itself.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from functools import partial

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from common.backoff import Backoff
from common.clock import Clock
from common.errors import FerryError, Unavailable
from common.observability import context_from, traceparent_of
from common.trust import Signer
from controller.operations import commit, has_open_ends, load_snapshot
from controller.orders import decode_order, first_order
from controller.rollouts.model import TERMINAL_ROLLOUT_STATES, Rollout
from controller.rollouts.planner import Action, RequestPatch, plan
from controller.store.port import Order, Store, Transaction

STEPS_PER_PASS_MAX = 64
"""Steps of one rollout before its orders are sent and the other rollouts get their turn."""
ORDERS_PER_DISPATCH_MAX = 256
PUBLISHES_AT_ONCE_MAX = 32
LATE_EVERY_S = 10.0
"""How often rollouts that have ended are looked at for devices that came back late."""
LATE_ROLLOUTS_MAX = 20
"""The newest rollouts that are looked at then; in older ones, a device that never came back stays as it was."""
PUBLISH_BACKOFF = Backoff(base_s=0.5, cap_s=15.0)

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)


class Reconciler:
    """Run `run()` as a task; `nudge()` whenever something may have changed; `stop()` ends the loop after its pass.

    `publish` returns when the broker has the order and raises `Unavailable` otherwise. `patches_requested` is called
    after patches were asked for, so that their builder need not wait for its own tick.
    """

    def __init__(
        self,
        store: Store,
        publish: Callable[[Order], Awaitable[None]],
        signer: Signer,
        clock: Clock,
        interval_s: float = 1.0,
        *,
        patches_requested: Callable[[], object] = lambda: None,
        backoff: Backoff = PUBLISH_BACKOFF,
        chance: random.Random | None = None,
    ) -> None:
        self._store = store
        self._publish = publish
        self._signer = signer
        self._clock = clock
        self._interval_s = interval_s
        self._patches_requested = patches_requested
        self._backoff = backoff
        self._chance = chance or random.Random()  # noqa: S311 - it spreads retries, it guards nothing
        self._listening_since: float | None = clock.now()
        self._failed_dispatches = 0
        self._dispatch_not_before = 0.0
        self._late_not_before = 0.0
        self._closed: set[str] = set()
        self._wake = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Reconcile until `stop()`. Trouble with the store or the broker is logged and tried again."""
        while not self._stopping:
            self._wake.clear()
            if await self.reconcile():
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):  # before 3.12 `wait_for` can swallow a cancellation
                    await self._wake.wait()

    def nudge(self) -> None:
        """Something changed: look soon."""
        self._wake.set()

    def stop(self) -> None:
        """End `run()` after the pass that is under way."""
        self._stopping = True
        self._wake.set()

    def hears(self, listening: bool) -> None:
        """Whether devices' messages can reach us now; their silence counts only while they can."""
        if not listening:
            self._listening_since = None
        elif self._listening_since is None:
            self._listening_since = self._clock.now()
            self._dispatch_not_before = 0.0
            self.nudge()

    async def reconcile(self) -> bool:
        """One pass over all rollouts and unsent orders; whether there is more to do at once."""
        try:
            rollouts = await self._store.read(lambda tx: tx.rollouts.active())
            unfinished = [await self._advance(rollout) for rollout in rollouts]
            await self._hear_latecomers()
            return await self.dispatch() or any(unfinished)
        except FerryError as error:
            logger.warning("cannot reconcile: %s", error)
            return False

    async def dispatch(self) -> bool:
        """Send orders that the broker has not acknowledged; whether more are waiting. Backs off while it is away."""
        if self._clock.monotonic() < self._dispatch_not_before:
            return False
        orders = await self._store.read(lambda tx: tx.orders.unpublished(ORDERS_PER_DISPATCH_MAX))
        if not orders:
            return False
        turn = asyncio.Semaphore(PUBLISHES_AT_ONCE_MAX)
        sent = await asyncio.gather(*(self._send(order, turn) for order in orders))
        acknowledged = [order for order, has_it in zip(orders, sent, strict=True) if has_it]
        if acknowledged:
            await self._store.write(lambda tx: _mark_published(tx, acknowledged))
        self._plan_next_dispatch(all(sent))
        return all(sent) and len(orders) == ORDERS_PER_DISPATCH_MAX

    async def _advance(self, rollout: Rollout) -> bool:
        """Take the rollout as far as it goes now; whether it could go further at once."""
        try:
            # Most looks find nothing to do: they must not occupy the one writer.
            if not await self._store.read(lambda tx: self._due(tx, rollout.id)[1]):
                return False
            for _ in range(STEPS_PER_PASS_MAX):
                if not await self._step(rollout):
                    return False
        except FerryError as error:
            logger.warning("rollout %s: %s", rollout.id, error, extra={"rollout": rollout.id})
            return False
        return True

    async def _hear_latecomers(self) -> None:
        """Take note of devices whose rollout has ended without them."""
        if self._clock.monotonic() < self._late_not_before:
            return
        self._late_not_before = self._clock.monotonic() + LATE_EVERY_S
        recent = await self._store.read(lambda tx: tx.rollouts.page("", LATE_ROLLOUTS_MAX))
        ended = {rollout.id: rollout for rollout in recent if rollout.state in TERMINAL_ROLLOUT_STATES}
        self._closed &= ended.keys()  # one that is being taken back after all is open again
        for name in ended.keys() - self._closed:
            await self._advance(ended[name])
            if not await self._store.read(partial(has_open_ends, rollout_id=name)):
                self._closed.add(name)

    async def _step(self, rollout: Rollout) -> bool:
        """Plan and commit once; whether there was anything to do."""
        with tracer.start_as_current_span("rollout.step", context_from(rollout.traceparent)) as span:
            span.set_attribute("ferry.rollout.id", rollout.id)
            span.set_attribute("ferry.release", str(rollout.spec.release))
            actions = await self._store.write(lambda tx: self._decide(tx, rollout.id))
            span.set_attribute("ferry.actions", len(actions))
        if any(isinstance(action, RequestPatch) for action in actions):
            self._patches_requested()
        return bool(actions)

    def _decide(self, tx: Transaction, rollout_id: str) -> list[Action]:
        """Plan and commit in one transaction, so that nothing changes in between."""
        rollout, actions = self._due(tx, rollout_id)
        if rollout is not None and actions:
            commit(tx, rollout, actions, signer=self._signer, now=self._clock.now(), traceparent=traceparent_of())
        return actions

    def _due(self, tx: Transaction, rollout_id: str) -> tuple[Rollout | None, list[Action]]:
        rollout = tx.rollouts.get(rollout_id)
        if rollout is None:
            return None, []
        return rollout, plan(load_snapshot(tx, rollout, self._listening_since), self._clock.now())

    async def _send(self, order: Order, turn: asyncio.Semaphore) -> bool:
        """Whether the broker has acknowledged the order."""
        async with turn:
            context = context_from(decode_order(order).traceparent)
            with tracer.start_as_current_span("order.publish", context, record_exception=False) as span:
                span.set_attribute("ferry.device", order.device)
                span.set_attribute("ferry.generation", order.generation)
                try:
                    await self._publish(order)
                except Unavailable as error:
                    span.set_status(Status(StatusCode.ERROR, str(error)))
                    logger.info("order %d for %s waits: %s", order.generation, order.device, error)
                    return False
        return True

    def _plan_next_dispatch(self, all_sent: bool) -> None:
        if all_sent:
            self._failed_dispatches = 0
            self._dispatch_not_before = 0.0
            return
        delay_s = self._backoff.delay_s(self._failed_dispatches, self._chance.random())
        self._failed_dispatches += 1
        self._dispatch_not_before = self._clock.monotonic() + delay_s


def _mark_published(tx: Transaction, orders: list[Order]) -> None:
    for order in orders:
        tx.orders.mark_published(order.device, order.generation)


__all__ = ["Reconciler", "first_order"]
