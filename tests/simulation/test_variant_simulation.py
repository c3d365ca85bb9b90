"""Variants by measurement over a simulated fleet of two classes: each settles on its own, and nobody changes under way.

As in `test_rollout_simulation`, a run is made by its seed alone, and each promise has a mutant.
"""

from collections import Counter

import pytest
from msgspec.structs import replace

from common.ids import DeviceId, ReleaseRef, Version
from controller.devices import next_generation
from controller.orders import decode_order
from controller.rollouts import choosing
from controller.rollouts.model import (
    TERMINAL_ROLLOUT_STATES,
    ErrorBudget,
    ExecutionState,
    PhaseSpec,
    Rollout,
    RolloutSpec,
    RolloutState,
)
from controller.rollouts.planner import Action, Notify, Snapshot, plan
from controller.variants import EXPLORERS, decide
from tests.simulation.device import Kind
from tests.simulation.invariants import Invariants, Violation
from tests.simulation.world import MODEL, V2, Planner, Weather, World

VARIANTS = ("default", "fp16", "int8")
OLD = Kind("old board", {"default": 0.010, "fp16": 0.0095, "int8": 0.004})
NEW = Kind("new board", {"default": 0.010, "fp16": 0.005, "int8": 0.012})
BEST = {"old board": "int8", "new board": "fp16"}
CALM = Weather(lost=0, repeated=0, transfer_broke=0, reboot=0, away=0)
LONG_S = 6 * 3600.0
SEEDS = range(3)


def spec(*phases: float, **changes: object) -> RolloutSpec:
    plain = RolloutSpec(
        release=ReleaseRef(MODEL, V2),
        phases=tuple(PhaseSpec(percent=percent) for percent in phases or (100,)),
        bake_s=60,
        probation_s=30,
        silence_s=180,
        straggler_s=600,
    )
    return replace(plain, **changes)


class Steady:
    """Watches that no order changes a device's variant of a release while a rollout of that release runs."""

    def __init__(self) -> None:
        self._invariants = Invariants()
        self._ordered: dict[tuple[str, DeviceId], tuple[int, Version, str]] = {}

    def __call__(self, world: World, rollout: Rollout, actions: list[Action]) -> None:
        self._invariants(world, rollout, actions)
        if rollout.state in TERMINAL_ROLLOUT_STATES:
            return
        for name in (one.device for one in world.executions(rollout.id) if one.generation):
            order, key = world.store.orders.rows[name], (rollout.id, name)
            before = self._ordered.get(key)
            if before and before[0] == order.generation:
                continue
            model = decode_order(order).models[0]
            if before and before[1] == model.version and before[2] != model.variant:
                raise Violation(f"{name} went from {before[2]} to {model.variant} during {rollout.id}")
            self._ordered[key] = (order.generation, model.version, model.variant)


def running(world: World) -> dict[str, Counter[str]]:
    """How many devices of each class run which variant of V2."""
    manifest = world.store.releases.rows[ReleaseRef(MODEL, V2)].manifest
    names = {variant.artifact.digest: name for name, variant in manifest.variants.items()}
    found: dict[str, Counter[str]] = {kind: Counter() for kind in BEST}
    for device in world.fleet.values():
        assert device.kind is not None
        if device.entry is not None and device.running == V2 and device.entry.artifact is not None:
            found[device.kind.name][names[device.entry.artifact]] += 1
    return found


def finish(world: World, asked: RolloutSpec) -> str:
    name = world.create(asked)
    ended = world.run(lambda: world.rollout(name).state in TERMINAL_ROLLOUT_STATES, LONG_S)
    assert ended, f"still {world.rollout(name).state}: {world.rollout(name).reason}"
    assert world.rollout(name).state is RolloutState.SUCCEEDED, world.rollout(name).reason
    return name


def two_classes(seed: int, planner: Planner = plan, phases: tuple[float, ...] = (100,)) -> World:
    """Each class ends on its fastest variant, all but the few that tried the others."""
    world = World(seed, devices=40, weather=CALM, kinds=(OLD, NEW), variants=VARIANTS, watch=Steady(), planner=planner)
    finish(world, spec(*phases))
    for kind, variants in running(world).items():
        assert variants.total() == 20
        others = {name: number for name, number in variants.items() if name != BEST[kind]}
        assert all(number <= EXPLORERS for number in others.values()), f"{kind} did not settle: {variants}"
    return world


@pytest.mark.parametrize("phases", [(100,), (10, 50, 100)], ids=["one phase", "three phases"])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_classes_settle_on_different_variants(seed: int, phases: tuple[float, ...]) -> None:
    two_classes(seed, phases=phases)


def test_the_next_rollout_of_the_release_moves_those_who_tried_others_and_says_why() -> None:
    world = two_classes(0)
    name = finish(world, spec())
    assert {kind: set(variants) for kind, variants in running(world).items()} == {
        kind: {best} for kind, best in BEST.items()
    }
    chosen = [one.chosen for one in world.executions(name)]
    assert all(one is not None and one.because.startswith("fastest of 3 on this class: ") for one in chosen)
    assert {device.chosen[MODEL].variant for device in world.store.devices.all()} == set(BEST.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_network_delays_the_choice_and_changes_no_device_twice(seed: int) -> None:
    world = World(seed, devices=40, kinds=(OLD, NEW), variants=VARIANTS, watch=Steady())
    finish(world, spec(10, 50, 100))
    assert world.run(lambda: all(device.running == V2 for device in world.fleet.values()), LONG_S)
    for kind, variants in running(world).items():
        assert variants[BEST[kind]] > variants.total() / 2, f"{kind} did not settle: {variants}"


def test_a_variant_that_a_class_cannot_load_fails_on_those_who_try_it_and_is_not_tried_again() -> None:
    odd = replace(OLD, unloadable=frozenset({"int8"}))
    world = World(1, devices=40, weather=CALM, kinds=(odd, NEW), variants=VARIANTS, watch=Steady())
    name = finish(world, spec(error_budget=ErrorBudget(count=EXPLORERS)))
    failed = [one for one in world.executions(name) if one.state is ExecutionState.FAILED]
    assert [one.chosen and one.chosen.variant for one in failed] == ["int8"] * EXPLORERS
    assert running(world)["old board"].total() == 20 - EXPLORERS
    assert running(world)["new board"]["fp16"] >= 20 - 2 * EXPLORERS

    finish(world, spec())  # tolerates no failure

    assert running(world)["old board"].total() == 20
    assert running(world)["old board"]["int8"] == 0


def test_an_unreachable_class_gets_the_release_all_the_same() -> None:
    """Those who were to try are stragglers after their time; the others wait no longer than that."""
    away = Weather(lost=0, repeated=0, transfer_broke=0, reboot=0, away=0.6, back_after_s=7200)
    world = World(2, devices=40, weather=away, kinds=(OLD, NEW), variants=VARIANTS, watch=Steady())
    finish(world, spec())
    assert world.run(lambda: all(device.running == V2 for device in world.fleet.values()), LONG_S)


# Mutants


def amnesiac(snapshot: Snapshot, now: float) -> list[Action]:
    """Forgets what devices have found."""
    return plan(replace(snapshot, found={}), now)


def test_a_planner_that_forgets_findings_is_caught() -> None:
    with pytest.raises(AssertionError, match="did not settle"):
        two_classes(0, amnesiac)


def test_a_planner_that_waits_for_nobody_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "decide", lambda *given, **terms: decide(*given, **{**terms, "awaited": False}))
    with pytest.raises(AssertionError, match="did not settle"):
        two_classes(0)


def fickle(snapshot: Snapshot, now: float) -> list[Action]:
    """Moves a device that has tried a variant to another one before the rollout has ended."""
    tried = [one for one in snapshot.executions if one.state is ExecutionState.SUCCEEDED and one.attempt == 1]
    for one in tried:
        if one.chosen and one.chosen.exploring and one.chosen.variant == "default" and one.device in snapshot.devices:
            generation = next_generation(snapshot.devices[one.device])
            chosen = replace(one.chosen, variant="int8")
            again = replace(one, state=ExecutionState.NOTIFIED, generation=generation, chosen=chosen, attempt=2)
            return [Notify(execution=again, version=V2)]
    return plan(snapshot, now)


def test_a_planner_that_moves_a_device_under_way_is_caught() -> None:
    with pytest.raises(Violation, match="went from default to int8"):
        two_classes(0, fickle)
