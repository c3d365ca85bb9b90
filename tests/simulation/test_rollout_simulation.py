"""Rollouts over a simulated fleet of fifty devices: what must never happen, and what must happen in the end.

Every run is made by its seed alone, and a failure prints the command that replays it. For each promise there is a
mutant, a planner that breaks it, and a test that the promise is seen to be broken.
"""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from common.ids import ReleaseRef, Version
from controller import operations
from controller.rollouts import planner
from controller.rollouts.judgement import IN_FLIGHT
from controller.rollouts.model import (
    TERMINAL_ROLLOUT_STATES,
    ErrorBudget,
    Execution,
    ExecutionState,
    OnFailure,
    PhaseSpec,
    RolloutSpec,
    RolloutState,
)
from controller.rollouts.planner import Action, Notify, Renew, Snapshot, UpdateExecution, plan
from tests.simulation.device import Flaw
from tests.simulation.invariants import Invariants, Violation
from tests.simulation.world import MODEL, V1, V2, V3, Planner, Weather, World

SEEDS = range(4)
PHASES = (PhaseSpec(percent=10), PhaseSpec(percent=50), PhaseSpec(percent=100))
LONG_S = 4 * 3600.0
CALM = Weather(lost=0, repeated=0, transfer_broke=0, reboot=0, away=0)
Run = Callable[[], None]


def spec(version: Version = V2, **changes: object) -> RolloutSpec:
    plain = RolloutSpec(
        release=ReleaseRef(MODEL, version), phases=PHASES, bake_s=60, probation_s=30, silence_s=180, straggler_s=600
    )
    return replace(plain, **changes)


def replayable(request: pytest.FixtureRequest, run: Run) -> None:
    """Run; say how to see a failure again."""
    try:
        run()
    except AssertionError as error:
        error.add_note(f'replay it with: .venv/bin/python -m pytest "{request.node.nodeid}"')
        raise


def healthy(seed: int, planner: Planner = plan, weather: Weather = Weather()) -> None:  # noqa: B008 - frozen
    """A good release reaches everybody, bad network and all."""
    world = World(seed, weather=weather, planner=planner, watch=Invariants())
    name = world.create(spec())
    ended = world.run(lambda: world.rollout(name).state in TERMINAL_ROLLOUT_STATES, LONG_S)
    assert ended, f"still {world.rollout(name).state}: {world.rollout(name).reason}"
    assert world.rollout(name).state is RolloutState.SUCCEEDED, world.rollout(name).reason
    everywhere = world.run(lambda: all(device.running == V2 for device in world.fleet.values()), LONG_S)
    assert everywhere, "a device that came back did not get the release"


def broken(
    seed: int,
    flaw: Flaw = Flaw.UNHEALTHY,
    planner: Planner = plan,
    weather: Weather = Weather(),  # noqa: B008
) -> None:
    """A bad release stops in its first phase and everybody who can go back does."""
    world = World(seed, weather=weather, flaws={V2: flaw}, planner=planner, watch=Invariants(bad=True))
    name = world.create(spec())
    ended = world.run(lambda: world.rollout(name).state in TERMINAL_ROLLOUT_STATES, LONG_S)
    assert ended, f"still {world.rollout(name).state}: {world.rollout(name).reason}"
    assert world.rollout(name).state is RolloutState.ROLLED_BACK
    living = [device for device in world.fleet.values() if not device.dead]
    back = world.run(lambda: all(device.running == V1 and device.target is None for device in living), LONG_S)
    assert back, "a device did not go back"
    assert all(device.assigned[MODEL] == V1 for device in world.store.devices.all())


def late_trouble(seed: int, planner: Planner = plan) -> None:
    """Taking back a rollout half way returns the devices that had succeeded, too."""
    world = World(seed, planner=planner, watch=Invariants())
    name = world.create(spec())
    assert world.run(lambda: world.rollout(name).phases[1].baking_since is not None, LONG_S)
    rollout = operations.act_on_rollout(world.store.view, name, "rollback", now=world.now)
    assert rollout.state is RolloutState.ROLLING_BACK
    assert world.run(lambda: world.rollout(name).state is RolloutState.ROLLED_BACK, LONG_S)
    back = world.run(lambda: all(device.running == V1 for device in world.fleet.values()), LONG_S)
    assert back, "a device that had succeeded did not go back"


def overtaken(seed: int, planner: Planner = plan) -> None:
    """A newer rollout of the model takes over while the older one is under way."""
    world = World(seed, planner=planner, watch=Invariants())
    older = world.create(spec(V2))
    assert world.run(lambda: world.rollout(older).phases[0].started_at is not None, LONG_S)
    world.run(lambda: False, world.chance.random() * 600)
    newer = world.create(spec(V3))
    assert world.run(lambda: world.rollout(newer).state in TERMINAL_ROLLOUT_STATES, LONG_S)
    assert world.rollout(newer).state is RolloutState.SUCCEEDED
    assert world.rollout(older).state in {RolloutState.ABORTED, RolloutState.SUCCEEDED}
    assert world.run(lambda: all(device.running == V3 for device in world.fleet.values()), LONG_S)


def thrifty(seed: int, planner: Planner = plan) -> None:
    """A release that is too dear for its budget reaches nobody, until a patch that comes late makes it cheap enough."""
    world = World(seed, planner=planner, watch=Invariants())
    name = world.create(spec(max_bytes=500))
    world.run(lambda: False, 3600)
    assert world.rollout(name).state is RolloutState.RUNNING, world.rollout(name).reason
    assert all(device.running == V1 for device in world.fleet.values()), "a device took more than its budget"
    world.build(V1, V2, 200)
    ended = world.run(lambda: world.rollout(name).state in TERMINAL_ROLLOUT_STATES, LONG_S)
    assert ended, f"still {world.rollout(name).state}: {world.rollout(name).reason}"
    assert world.rollout(name).state is RolloutState.SUCCEEDED, world.rollout(name).reason
    everywhere = world.run(lambda: all(device.running == V2 for device in world.fleet.values()), LONG_S)
    assert everywhere, "a device that waited was not told of the cheaper way"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_byte_budget_is_kept_and_waiting_devices_hear_of_a_cheaper_way(
    seed: int, request: pytest.FixtureRequest
) -> None:
    replayable(request, lambda: thrifty(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_healthy_release_reaches_everybody(seed: int, request: pytest.FixtureRequest) -> None:
    replayable(request, lambda: healthy(seed))


@pytest.mark.parametrize("flaw", [Flaw.UNHEALTHY, Flaw.UNLOADABLE, Flaw.MUTE])
@pytest.mark.parametrize("seed", SEEDS[:3])
def test_a_bad_release_is_stopped_in_its_first_phase_and_taken_back(
    seed: int, flaw: Flaw, request: pytest.FixtureRequest
) -> None:
    replayable(request, lambda: broken(seed, flaw))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rollback_takes_back_devices_that_had_succeeded(seed: int, request: pytest.FixtureRequest) -> None:
    replayable(request, lambda: late_trouble(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_newer_rollout_takes_over(seed: int, request: pytest.FixtureRequest) -> None:
    replayable(request, lambda: overtaken(seed))


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_a_controller_that_was_deaf_blames_nobody(seed: int, request: pytest.FixtureRequest) -> None:
    deaf = Weather(deaf_at_s=(90, 900, 1600), deaf_for_s=400)
    replayable(request, lambda: healthy(seed, weather=deaf))


@pytest.mark.parametrize("on_failure", [OnFailure.PAUSE, OnFailure.ABORT])
def test_a_bad_release_can_stop_a_rollout_without_taking_it_back(on_failure: OnFailure) -> None:
    world = World(1, weather=CALM, flaws={V2: Flaw.UNHEALTHY}, watch=Invariants(bad=True))
    name = world.create(spec(on_failure=on_failure))
    stopped = RolloutState.PAUSED if on_failure is OnFailure.PAUSE else RolloutState.ABORTED
    assert world.run(lambda: world.rollout(name).state is stopped, LONG_S)
    world.run(lambda: False, 600)
    assert world.rollout(name).state is stopped


def test_failures_within_the_budget_do_not_stop_a_rollout() -> None:
    world = World(3, weather=CALM, watch=Invariants())
    for device in list(world.fleet.values())[::10]:
        device.flaws = {V2: Flaw.UNHEALTHY}
    name = world.create(spec(error_budget=ErrorBudget(count=5)))
    assert world.run(lambda: world.rollout(name).state in TERMINAL_ROLLOUT_STATES, LONG_S)
    assert world.rollout(name).state is RolloutState.SUCCEEDED
    failed = [one for one in world.executions(name) if one.state is ExecutionState.FAILED]
    assert len(failed) == 5


# Mutants: each breaks one promise, and is caught.


def careless(snapshot: Snapshot, now: float) -> list[Action]:
    """Tolerates any number of failures."""
    rollout = snapshot.rollout
    generous = replace(rollout, spec=replace(rollout.spec, error_budget=ErrorBudget(count=10**6)))
    return plan(replace(snapshot, rollout=generous), now)


def unstoppable(snapshot: Snapshot, now: float) -> list[Action]:
    """Goes on telling devices after the rollout has stopped."""
    actions = plan(snapshot, now)
    if snapshot.rollout.state is not RolloutState.ROLLING_BACK:
        return actions
    idle = [one for one in snapshot.executions if one.notified_at is None]
    return [*actions, *(_told(one, now) for one in idle[:1])]


def hasty(snapshot: Snapshot, now: float) -> list[Action]:
    """Tells a device of a later phase together with the first."""
    actions = plan(snapshot, now)
    told = any(isinstance(action, Notify) for action in actions)
    later = [one for one in snapshot.executions if one.state is ExecutionState.QUEUED and one.phase > 0]
    return [*actions, *(_told(one, now) for one in later[:1] if told)]


def ticking(snapshot: Snapshot, now: float) -> list[Action]:
    """Looks at the error budget only every ten minutes."""
    return plan(snapshot, now) if now % 600 < 6 else careless(snapshot, now)


def blaming(snapshot: Snapshot, now: float) -> list[Action]:
    """Counts devices that were never told as failed once the rollout has stopped."""
    canceled = [one for one in snapshot.executions if one.state is ExecutionState.CANCELED]
    blamed = [UpdateExecution(execution=replace(one, state=ExecutionState.FAILED)) for one in canceled[:1]]
    return [*plan(snapshot, now), *blamed]


def forgetful(snapshot: Snapshot, now: float) -> list[Action]:
    """Takes a rollout back only from devices that have not succeeded."""
    if snapshot.rollout.state is not RolloutState.ROLLING_BACK:
        return plan(snapshot, now)
    rest = tuple(one for one in snapshot.executions if one.state is not ExecutionState.SUCCEEDED)
    return plan(replace(snapshot, executions=rest), now)


def impatient(snapshot: Snapshot, now: float) -> list[Action]:
    """Takes a device that is slow to activate for a failed one."""
    slow = [one for one in snapshot.executions if one.state in IN_FLIGHT and now - (one.notified_at or now) > 120]
    failed = [replace(one, state=ExecutionState.FAILED, finished_at=now) for one in slow]
    return [*plan(snapshot, now), *(UpdateExecution(execution=one) for one in failed)]


def patient(snapshot: Snapshot, now: float) -> list[Action]:
    """Waits for stragglers for ever."""
    rollout = snapshot.rollout
    return plan(replace(snapshot, rollout=replace(rollout, spec=replace(rollout.spec, straggler_s=1e12))), now)


def suspicious(snapshot: Snapshot, now: float) -> list[Action]:
    """Blames devices for a silence in which nobody listened."""
    return plan(replace(snapshot, listening_since=0.0), now)


def silent(snapshot: Snapshot, now: float) -> list[Action]:
    """Keeps better offers to itself."""
    return [action for action in plan(snapshot, now) if not isinstance(action, Renew)]


def _told(execution: Execution, now: float) -> Notify:
    told = replace(execution, state=ExecutionState.NOTIFIED, notified_at=now, generation=2)
    return Notify(execution=told, version=V2)


@pytest.mark.parametrize(
    ("mutant", "violation"),
    [
        (careless, "beyond its first phase|with .* failures"),
        (unstoppable, "while the rollout was rolling_back"),
        (hasty, "told too early"),
        (ticking, "with .* failures|beyond its first phase"),
        (blaming, "were not in flight then"),
    ],
)
def test_unsafe_planners_are_caught(mutant: Planner, violation: str) -> None:
    with pytest.raises(Violation, match=violation):
        for seed in SEEDS:
            broken(seed, planner=mutant)


def test_a_planner_that_forgets_succeeded_devices_is_caught() -> None:
    with pytest.raises(AssertionError, match="did not go back"):
        late_trouble(0, planner=forgetful)


def test_a_planner_that_takes_slowness_for_failure_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"rolled_back|failed in phase"):
        healthy(0, planner=impatient)


def test_a_planner_that_waits_for_stragglers_is_caught() -> None:
    with pytest.raises(AssertionError, match="still running"):
        healthy(0, planner=patient, weather=Weather(back_after_s=1e9))


def test_a_planner_that_keeps_better_offers_to_itself_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"still running|was not told"):
        thrifty(0, silent)


def test_a_planner_that_blames_devices_for_its_own_deafness_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"silent|not heard"):
        healthy(0, planner=suspicious, weather=Weather(deaf_at_s=(90, 900, 1600), deaf_for_s=400))


def test_a_planner_that_passes_without_data_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "has_evidence", lambda _standing: True)
    with pytest.raises(Violation, match="passed with no device resolved"):
        healthy(0, weather=Weather(away=1.0))


def test_creating_without_superseding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_active_of", lambda _tx, _model: [])
    with pytest.raises(Violation, match="two active rollouts"):
        overtaken(0)
