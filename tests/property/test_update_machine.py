"""The update machine keeps its promises whatever happens, and the promises are known to be checked."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from common.wire import DesiredModel, OnExceed, Shadow, Split
from edge_agent.slots import SLOTS
from edge_agent.update import Slot, Stage, step
from edge_agent.update import events as ev
from edge_agent.update.machine import MOVES
from edge_agent.update.state import fingerprint
from tests.property.update_mutants import MUTANTS
from tests.property.update_world import WAYS, Machine, World, target_of

VERSIONS = st.integers(1, 3)
BUDGETS = (None, None, 50, 400, 1200, 2150)
"""In bytes: for any way, nothing, offers alone, one whole file, and both but no byte twice."""
ON_EXCEED: tuple[OnExceed, ...] = ("defer", "fail")
SHADOWS = (None, Shadow(for_s=5.0), Shadow(for_s=5.0, agreement_min=0.9), Shadow(for_s=5.0, on_few="fail"))
SPLITS = (None, None, Split(share=0.1), Split(share=0.5))
PROBATIONS_S = (10.0, 20.0)
OUTCOMES = (
    "good", "good", "good", "transient", "wrong", "manifest", "refused", "slow", "unhealthy", "quiet", "disagrees",
)  # fmt: skip
FAST = settings(
    max_examples=200,
    stateful_step_count=30,
    report_multiple_bugs=False,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
WALKS_MAX = 20_000
"""Random walks until a mutant must have been caught; most take fewer than a hundred."""


class Updates(RuleBasedStateMachine):
    """Orders, results, withdrawals and deaths in any order. `machine` is what is tested."""

    machine: Machine = staticmethod(step)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(type(self).machine)
        self.orders = 0

    @rule(
        version=VERSIONS,
        base=st.none() | VERSIONS,
        ways=st.sets(st.sampled_from(WAYS)),
        budget=st.sampled_from(BUDGETS),
        on_exceed=st.sampled_from(ON_EXCEED),
        shadow=st.sampled_from(SHADOWS),
        probation_s=st.sampled_from(PROBATIONS_S),
        split=st.sampled_from(SPLITS),
    )
    def a_newer_order(
        self,
        version: int,
        base: int | None,
        ways: set[str],
        budget: int | None,
        on_exceed: OnExceed,
        shadow: Shadow | None,
        split: Split | None,
        probation_s: float,
    ) -> None:
        self.orders += 1
        terms = {"max_bytes": budget, "on_exceed": on_exceed, "shadow": shadow, "split": split}
        target = target_of(version, self.orders, base=base, ways=ways, probation_s=probation_s, **terms)  # type: ignore[arg-type]
        order_to(self.world, target)

    @precondition(lambda self: self.orders > 0)
    @rule(data=st.data(), version=VERSIONS)
    def an_order_that_did_not_change_for_this_model(self, data: st.DataObject, version: int) -> None:
        order_to(self.world, target_of(version, data.draw(st.integers(1, self.orders))))

    @precondition(lambda self: self.world.pending is not None)
    @rule(outcome=st.sampled_from(OUTCOMES))
    def work_ends(self, outcome: str) -> None:
        self.world.finish_work(outcome)

    @precondition(lambda self: self.world.pending is not None)
    @rule()
    def all_goes_well_for_a_while(self) -> None:
        for _ in range(5):
            self.world.finish_work("good")

    @rule()
    def a_poll_is_answered(self) -> None:
        self.world.look_again()

    @rule()
    def withdrawn(self) -> None:
        self.world.happen(lambda at: ev.Withdrawn(at=at))

    @rule(steps=st.integers(0, 4))
    def dies_soon(self, steps: int) -> None:
        self.world.fuse = steps

    @rule(clean=st.booleans())
    def dies_now(self, clean: bool) -> None:
        self.world.die(clean=clean)

    @rule(slot=st.sampled_from(SLOTS))
    def a_slot_rots(self, slot: Slot) -> None:
        self.world.rot(slot)

    @rule(slot=st.sampled_from(SLOTS))
    def a_slot_is_mended(self, slot: Slot) -> None:
        self.world.mend(slot)

    @rule(version=VERSIONS)
    def the_engine_changes(self, version: int) -> None:
        self.world.change_engine(version)

    @rule()
    def somebody_asks(self) -> None:
        self.world.happen(lambda at: ev.Wanted(at=at))

    @rule(tight=st.booleans())
    def memory_changes(self, tight: bool) -> None:
        self.world.shrink(tight=tight)

    @rule(version=VERSIONS)
    def a_plugin_is_uninstalled(self, version: int) -> None:
        self.world.lose_plugin(version)

    @rule()
    def plugins_are_installed(self) -> None:
        self.world.find_plugin()

    @rule(version=VERSIONS)
    def the_device_is_too_slow(self, version: int) -> None:
        self.world.slow_down(version)

    def teardown(self) -> None:
        self.world.fuse = None
        self.world.settle()


TestUpdates = Updates.TestCase
TestUpdates.settings = FAST


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__.strip("_"))
def test_every_mutant_is_caught(mutant: Machine) -> None:
    with pytest.raises(AssertionError):
        for seed in range(WALKS_MAX):
            walk(World(mutant), random.Random(seed))


def test_the_same_walks_find_nothing_wrong_and_go_every_arrow_of_the_table() -> None:
    seen = set()
    for seed in range(12_000):
        world = World(step)
        walk(world, random.Random(seed))
        seen |= world.arrows
    drawn = {(stage, move.event, to) for move in MOVES for stage in move.stages for to in move.to - {stage}}
    # Nobody sees a model half switched: the switch is over before the next event is looked at.
    unseen = {arrow for arrow in drawn - seen if arrow[0] is not Stage.SWITCHING}
    assert not seen - drawn, "a device went an arrow that the table does not have"
    assert not unseen, "the table has an arrow that no device goes"


def order_to(world: World, target: DesiredModel) -> None:
    world.happen(lambda at: ev.Ordered(at=at, target=target))


def any_target(order: int, chance: random.Random) -> DesiredModel:
    return target_of(
        chance.randint(1, 3),
        order,
        base=chance.choice([None, 1, 2, 3]),
        ways=[way for way in WAYS if chance.random() < 0.5],
        max_bytes=chance.choice(BUDGETS),
        on_exceed=chance.choice(ON_EXCEED),
        shadow=chance.choice(SHADOWS),
        split=chance.choice(SPLITS),
        probation_s=chance.choice(PROBATIONS_S),
    )


def until_nothing_answers(world: World, orders: int) -> int:
    """Release 1 runs, 3 was refused, and 2 is being loaded in the place of 1; the last order's number."""
    for version, outcome, end in ((1, "good", Stage.IDLE), (3, "refused", Stage.FAILED), (2, "good", Stage.REPLACING)):
        world.shrink(tight=end is Stage.REPLACING)
        orders += 1
        order_to(world, target_of(version, orders))
        for _ in range(20):  # a machine that is wrong on purpose may never get there
            if world.journal.stage is not end:
                world.finish_work(outcome if world.journal.stage is Stage.WARMING else "good")
    return orders


def trouble_while_nothing_answers(world: World, orders: int, chance: random.Random) -> None:
    match chance.randint(1, 4):
        case 1:
            world.finish_work("wrong")
        case 2:
            orders_of = {one: world.convicted.get(fingerprint(target_of(one, 1)), 0) for one in (1, 2, 3)}
            wanted = max(orders_of, key=orders_of.__getitem__) if chance.random() < 0.5 else chance.randint(1, 3)
            number = orders_of[wanted] or chance.randint(1, orders)
            order_to(world, target_of(wanted, number, shadow=chance.choice(SHADOWS)))
        case 3:
            world.die()
        case 4:
            world.happen(lambda at: ev.Withdrawn(at=at))


def until_one_serves(world: World) -> int:
    order_to(world, target_of(1, 1))
    for _ in range(20):
        world.finish_work("good")
    return 1


def walk(world: World, chance: random.Random) -> None:
    """A random life of a device, troubles first, then none. About every other one begins with a release that serves."""
    orders = chance.choice([0, 1]) and until_one_serves(world)
    if chance.random() < 0.1:
        orders = until_nothing_answers(world, orders)
    world.shrink(tight=chance.random() < (0.9 if world.journal.stage is Stage.REPLACING else 0.2))
    for _ in range(chance.randint(3, 20)):
        draw = chance.random()
        if world.journal.stage is Stage.REPLACING and chance.random() < 0.6:
            trouble_while_nothing_answers(world, orders, chance)
            continue
        if isinstance(world.pending, ev.Mirror) and draw > 0.3:  # that takes long, so much else may happen
            draw = chance.uniform(0.7, 1.0)
        if draw < 0.6 and world.pending is not None:
            world.finish_work(chance.choice(OUTCOMES))
        elif draw < 0.75:
            orders += 1
            order_to(world, any_target(orders, chance))
        elif draw < 0.88 and orders:
            order_to(world, target_of(chance.randint(1, 3), chance.randint(1, orders)))
        elif draw < 0.89:
            world.look_again()
        elif draw < 0.9:
            world.happen(lambda at: ev.Withdrawn(at=at))
        elif draw < 0.915:
            world.rot(chance.choice(SLOTS))
        elif draw < 0.92:
            world.mend(chance.choice(SLOTS))
        elif draw < 0.93:
            world.change_engine(chance.randint(1, 3))
        elif draw < 0.94:
            world.slow_down(chance.randint(1, 3))
        elif draw < 0.945:
            world.lose_plugin(chance.randint(1, 3))
        elif draw < 0.95:
            world.find_plugin()
        elif draw < 0.955:
            world.shrink(tight=chance.random() < 0.7)
        elif draw < 0.965:
            world.fuse = chance.randint(0, 4)
        else:
            world.die(clean=chance.random() < 0.3)
    world.fuse = None
    world.settle()
