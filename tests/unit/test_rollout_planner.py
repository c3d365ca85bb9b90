"""What the planner does in one situation after the other: a snapshot goes in, actions come out."""

import pytest
from msgspec.structs import replace

from common.ids import Digest, Version
from common.wire import Outcome, ShadowReport
from controller.devices import Device
from controller.rollouts.commands import act
from controller.rollouts.model import (
    ErrorBudget,
    Execution,
    ExecutionState,
    OnFailure,
    PhaseSpec,
    PhaseState,
    RolloutState,
    ShadowSpec,
)
from controller.rollouts.patching import PatchKey
from controller.rollouts.planner import (
    ORDERS_PER_PLAN_MAX,
    Notify,
    Renew,
    RequestPatch,
    Revert,
    Snapshot,
    UpdateExecution,
    UpdateRollout,
    plan,
    watched,
)
from tests.unit.fleet import (
    CODEC,
    LINEAGE,
    MODEL,
    NOW,
    V1,
    V2,
    a_spec,
    artifact,
    device,
    manifest,
    rollout,
    saying,
    settled,
    snapshot,
    told,
)

QUEUED = Execution(device=device().id, phase=0)
V3 = Version("3")


def one(execution: Execution, state: Device, **changes: object) -> Snapshot:
    """A rollout of one phase and one device."""
    return snapshot(rollout(), [execution], [state], **changes)


def after(execution: Execution, state: Device, now: float = NOW) -> Execution:
    """The execution after one plan."""
    updates = [action for action in plan(one(execution, state), now) if isinstance(action, UpdateExecution)]
    return updates[0].execution if updates else execution


# Telling devices


def test_a_queued_device_is_told_with_its_next_generation_and_what_to_give_back() -> None:
    (action,) = plan(one(QUEUED, device(generation=7)), NOW)
    assert isinstance(action, Notify)
    assert action.version == V2
    assert (action.execution.generation, action.execution.previous, action.execution.notified_at) == (8, V1, NOW)


def test_an_offline_device_is_told_too() -> None:
    (action,) = plan(one(QUEUED, device(connected=False, last_seen=None)), NOW)
    assert isinstance(action, Notify)


def test_a_device_is_told_once_each_patch_that_could_serve_it_is_decided() -> None:
    state = saying(device(), held=(artifact(V1).digest,))
    key = PatchKey(artifact(V1).digest, artifact(V2).digest, CODEC)
    assert plan(one(QUEUED, state, lineage=LINEAGE), NOW) == [RequestPatch(key=key)]
    assert plan(one(QUEUED, state, lineage=replace(LINEAGE, decided={key: False})), NOW) == []
    (action,) = plan(one(QUEUED, state, lineage=replace(LINEAGE, decided={key: True})), NOW)
    assert isinstance(action, Notify)


@pytest.mark.parametrize(
    "held",
    [(artifact(V1).digest, artifact(V2).digest), (artifact(V3).digest,)],
    ids=["holds the release already", "holds only files of other models"],
)
def test_a_device_that_no_patch_can_serve_waits_for_none(held: tuple[Digest, ...]) -> None:
    (action,) = plan(one(QUEUED, saying(device(), held=held), lineage=LINEAGE), NOW)
    assert isinstance(action, Notify)


BUDGET = rollout(spec=a_spec(max_bytes=100))


@pytest.mark.parametrize("state", [ExecutionState.NOTIFIED, ExecutionState.IN_PROGRESS])
def test_a_device_that_waits_for_a_cheaper_way_is_told_of_one(state: ExecutionState) -> None:
    waiting = snapshot(BUDGET, [told(state=state)], [device()])
    assert plan(waiting, NOW) == []
    assert plan(replace(waiting, improvable=frozenset({device().id})), NOW) == [Renew(device=device().id)]


def test_patches_are_asked_for_that_could_help_a_device_to_keep_to_its_budget() -> None:
    holder = saying(device(), generation=2, target=V2, phase="fetching", held=(artifact(V1).digest,))
    at_work = told(state=ExecutionState.IN_PROGRESS)
    (action,) = plan(snapshot(BUDGET, [at_work], [holder], lineage=LINEAGE), NOW)
    assert isinstance(action, RequestPatch)
    assert plan(snapshot(rollout(), [at_work], [holder], lineage=LINEAGE), NOW) == []


def test_a_straggler_learns_of_a_cheaper_way_after_the_rollout_has_ended() -> None:
    ended = replace(BUDGET, state=RolloutState.SUCCEEDED)
    late = snapshot(ended, [told()], [device()], improvable=frozenset({device().id}))
    assert plan(late, NOW) == [Renew(device=device().id)]


def test_going_on_comes_before_telling_again() -> None:
    fleet = [device(), device("d1")]
    mixed = snapshot(BUDGET, [told(), Execution(device=fleet[1].id, phase=0)], fleet, improvable=frozenset({"d0"}))
    assert [type(action) for action in plan(mixed, NOW)] == [Notify]


def test_a_device_that_no_variant_fits_is_left_out() -> None:
    (action,) = plan(one(QUEUED, device(), manifest=manifest(variants=["int8"])), NOW)
    assert isinstance(action, UpdateExecution)
    assert action.execution.state is ExecutionState.CANCELED
    assert "variant" in action.execution.reason


def test_a_plan_makes_a_bounded_number_of_orders() -> None:
    fleet = [device(f"d{number}") for number in range(ORDERS_PER_PLAN_MAX + 20)]
    queued = [Execution(device=known.id, phase=0) for known in fleet]
    first = snapshot(rollout(), queued, fleet)
    assert len(plan(first, NOW)) == ORDERS_PER_PLAN_MAX
    states = {execution.state for execution in settled(first, NOW).executions}
    assert states == {ExecutionState.NOTIFIED}


@pytest.mark.parametrize("version", [None, V1])
def test_a_retry_gives_back_what_was_there_before_the_first_try(version: Version | None) -> None:
    again = replace(QUEUED, attempt=2, previous=version, generation=2)
    (action,) = plan(one(again, device(assigned={MODEL: V2})), NOW)
    assert isinstance(action, Notify)
    assert action.execution.previous == version


def test_a_version_that_the_device_has_put_aside_is_not_given_back() -> None:
    state = saying(device(assigned={MODEL: V3}), running=V1, phase="failed", outcome="rolled_back", update_version=V3)
    (action,) = plan(one(QUEUED, state), NOW)
    assert isinstance(action, Notify)
    assert action.execution.previous == V1


# What devices say


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (saying(device(), generation=2), ExecutionState.NOTIFIED),
        (saying(device(), generation=2, phase="fetching", target=V2), ExecutionState.IN_PROGRESS),
        (saying(device(), generation=2, phase="shadowing", target=V2), ExecutionState.IN_PROGRESS),
        (saying(device(), generation=2, phase="probation", target=V2, running=V2), ExecutionState.PROBATION),
        (saying(device(), generation=2, running=V2), ExecutionState.SUCCEEDED),
        (saying(device(), generation=3, running=V2, outcome="succeeded"), ExecutionState.SUCCEEDED),
        (saying(device(), generation=2, phase="failed", outcome="failed"), ExecutionState.FAILED),
        (saying(device(), generation=2, phase="failed", outcome="rolled_back"), ExecutionState.FAILED),
        (saying(device(), generation=2, phase="failed", outcome="rejected"), ExecutionState.FAILED),
    ],
)
def test_an_execution_follows_the_newest_report(words: Device, state: ExecutionState) -> None:
    assert after(told(), words).state is state


@pytest.mark.parametrize(
    "words",
    [
        saying(device(), generation=1, phase="failed", outcome="failed"),
        saying(device(), generation=1, running=V2),
        saying(device(), generation=2, phase="failed", outcome="failed", update_version=V3),
    ],
    ids=["a failure of an older order", "success before the order", "a failure of another release"],
)
def test_words_about_something_else_change_nothing(words: Device) -> None:
    assert after(told(), words).state is ExecutionState.NOTIFIED


def test_a_device_that_was_heard_only_at_the_end_has_activated_then() -> None:
    done = after(told(), saying(device(), generation=2, running=V2), NOW + 9)
    assert (done.activated_at, done.finished_at) == (NOW + 9, NOW + 9)


def test_a_failure_keeps_the_devices_reason() -> None:
    assert after(told(), saying(device(), generation=2, phase="failed", outcome="failed")).reason == "why"


# Silence


def test_what_a_device_waits_for_is_shown_while_it_waits() -> None:
    waits = saying(device(), phase="fetching", target=V2, generation=2, detail="the budget is too small")
    known = after(told(), waits)
    assert (known.state, known.detail) == (ExecutionState.IN_PROGRESS, "the budget is too small")
    assert after(known, waits) is known
    assert after(known, saying(device(), phase="fetching", target=V2, generation=2)).detail == ""
    done = after(known, saying(device(), running=V2, generation=2))
    assert (done.state, done.detail) == (ExecutionState.SUCCEEDED, "")


def test_silence_before_activation_is_no_failure() -> None:
    quiet = device(last_seen=NOW - 10_000)
    assert after(told(notified_at=NOW - 10_000), quiet).state is ExecutionState.NOTIFIED


@pytest.mark.parametrize("state", [ExecutionState.PROBATION, ExecutionState.SUCCEEDED])
def test_silence_after_activation_is_a_failure(state: ExecutionState) -> None:
    active = told(state=state, activated_at=NOW - 500)
    assert after(active, device(last_seen=NOW - 101)).state is ExecutionState.FAILED
    assert after(active, device(last_seen=NOW - 99)).state is state


def test_silence_is_not_blamed_on_devices_while_nobody_listened() -> None:
    active = told(state=ExecutionState.PROBATION, activated_at=NOW - 500)
    for listening_since in (None, NOW - 50):
        assert not plan(one(active, device(last_seen=NOW - 300), listening_since=listening_since), NOW)


def test_a_device_of_a_phase_that_has_passed_may_be_switched_off() -> None:
    done = told(state=ExecutionState.SUCCEEDED, activated_at=NOW - 500)
    later = rollout(PhaseState.PASSED, PhaseState.DEPLOYING)
    waiting = [done, replace(told("d1"), phase=1)]
    assert not plan(snapshot(later, waiting, [device(last_seen=NOW - 300), device("d1")]), NOW)


# Phases


def test_a_phase_waits_for_devices_that_work_and_not_for_stragglers() -> None:
    done, late = told("d0", ExecutionState.SUCCEEDED, finished_at=NOW), told("d1", notified_at=NOW)
    phase = snapshot(rollout(), [done, late], [device("d0"), device("d1")])
    assert not plan(phase, NOW + 199)
    (action,) = plan(phase, NOW + 201)
    assert isinstance(action, UpdateRollout)
    assert action.rollout.phases[0].state is PhaseState.BAKING


def test_a_phase_of_stragglers_only_does_not_pass() -> None:
    late = snapshot(rollout(), [told("d0")], [device("d0")])
    rested = settled(late, NOW + 100_000)
    assert rested.rollout.phases[0].state is PhaseState.DEPLOYING
    assert "straggler" in rested.rollout.reason


def test_a_phase_rests_on_its_own_devices_and_not_on_those_before() -> None:
    later = rollout(PhaseState.PASSED, PhaseState.DEPLOYING, spec=a_spec(phases=(PhaseSpec(count=1),) * 2))
    parts = [told("d0", ExecutionState.SUCCEEDED, finished_at=NOW), replace(told("d1"), phase=1)]
    rested = settled(snapshot(later, parts, [device("d0"), device("d1")]), NOW + 100_000)
    assert rested.rollout.phases[1].state is PhaseState.DEPLOYING


def test_a_phase_that_adds_nobody_rests_on_those_before() -> None:
    later = rollout(PhaseState.PASSED, PhaseState.DEPLOYING, spec=a_spec(phases=(PhaseSpec(count=1),) * 2))
    parts = [told("d0", ExecutionState.SUCCEEDED, finished_at=NOW)]
    assert settled(snapshot(later, parts, [device("d0")]), NOW).rollout.phases[1].state is PhaseState.BAKING


def test_a_phase_whose_devices_all_fell_out_does_not_pass() -> None:
    rested = settled(one(QUEUED, device(), manifest=manifest(variants=["int8"])), NOW + 100_000)
    assert rested.rollout.phases[0].state is PhaseState.DEPLOYING
    assert rested.rollout.reason == "no device of phase 1 can take the release"


def test_a_phase_bakes_for_its_own_time() -> None:
    done = told(state=ExecutionState.SUCCEEDED, finished_at=NOW)
    spec = a_spec(phases=(PhaseSpec(percent=100, bake_s=5),), bake_s=500)
    baking = snapshot(rollout(PhaseState.BAKING, spec=spec), [done], [device()])
    assert not plan(baking, NOW + 4)
    assert settled(baking, NOW + 6).rollout.state is RolloutState.SUCCEEDED


def test_a_phase_that_wants_approval_gets_it_first() -> None:
    spec = a_spec(phases=(PhaseSpec(count=1), PhaseSpec(percent=100, approval=True)))
    done = told(state=ExecutionState.SUCCEEDED, finished_at=NOW)
    queued = Execution(device=device("d1").id, phase=1)
    waiting = snapshot(
        rollout(PhaseState.PASSED, PhaseState.PENDING, spec=spec), [done, queued], [device(), device("d1")]
    )
    rested = settled(waiting, NOW)
    assert rested.rollout.state is RolloutState.AWAITING_APPROVAL
    assert rested.executions[1].state is ExecutionState.QUEUED
    approved, _ = act(rested.rollout, rested.executions, "approve", NOW)
    begun = settled(replace(rested, rollout=approved), NOW)
    assert begun.executions[1].state is ExecutionState.NOTIFIED


def test_patches_of_later_phases_are_asked_for_at_once() -> None:
    preparing = rollout(PhaseState.PENDING, PhaseState.PENDING, state=RolloutState.PREPARING)
    later = saying(device("d1"), held=(artifact(V1).digest,))
    parts = [QUEUED, Execution(device=later.id, phase=1)]
    (action,) = plan(snapshot(preparing, parts, [device(), later], lineage=LINEAGE), NOW)
    assert isinstance(action, RequestPatch)


def test_a_retry_bakes_anew() -> None:
    failed = told(state=ExecutionState.FAILED, activated_at=NOW, finished_at=NOW)
    after_retry, (again,) = act(rollout(PhaseState.BAKING), [failed], "retry", NOW)
    assert after_retry.phases[0].state is PhaseState.DEPLOYING
    assert after_retry.phases[0].baking_since is None
    assert (again.activated_at, again.finished_at) == (None, None)


def test_a_rollout_prepares_until_the_first_phase_has_its_patches() -> None:
    begin = snapshot(rollout(PhaseState.PENDING, state=RolloutState.PREPARING), [QUEUED], [device()])
    rested = settled(begin, NOW)
    assert rested.rollout.state is RolloutState.RUNNING
    assert rested.executions[0].state is ExecutionState.NOTIFIED


def test_planning_an_unchanged_world_again_changes_nothing() -> None:
    rested = settled(one(QUEUED, device()), NOW)
    assert plan(rested, NOW) == []


# The error budget


def failing(count: int, of: int, **changes: object) -> Snapshot:
    parts = [
        told(f"d{number}", ExecutionState.FAILED if number < count else ExecutionState.SUCCEEDED, finished_at=NOW)
        for number in range(of)
    ]
    queued = Execution(device=device("d99").id, phase=1)
    phases = (PhaseSpec(percent=50), PhaseSpec(percent=100))
    running = rollout(PhaseState.BAKING, PhaseState.PENDING, spec=a_spec(phases=phases, **changes))
    return snapshot(running, [*parts, queued], [device(part.device, assigned={MODEL: V2}) for part in parts])


@pytest.mark.parametrize(
    ("budget", "failed", "of", "spent"),
    [
        (ErrorBudget(), 1, 10, True),
        (ErrorBudget(count=1), 1, 10, False),
        (ErrorBudget(count=1), 2, 10, True),
        (ErrorBudget(percent=20), 2, 10, False),
        (ErrorBudget(percent=20), 3, 10, True),
        (ErrorBudget(percent=20, count=3), 3, 10, False),
        (ErrorBudget(percent=20, minimum=30), 9, 10, True),
    ],
)
def test_the_larger_of_count_and_ratio_is_tolerated(budget: ErrorBudget, failed: int, of: int, spent: bool) -> None:
    stopped = any(isinstance(action, UpdateRollout) for action in plan(failing(failed, of, error_budget=budget), NOW))
    assert stopped is spent


def test_a_ratio_waits_for_its_minimum_while_somebody_is_left() -> None:
    few = failing(1, 2, error_budget=ErrorBudget(percent=10, minimum=5))
    working = replace(told("d50"), notified_at=NOW)
    assert not plan(replace(few, executions=(*few.executions, working)), NOW)


def test_a_spent_budget_cancels_those_not_told_and_says_why() -> None:
    rested = settled(failing(1, 4), NOW)
    assert rested.rollout.phases[0].state is PhaseState.FAILED
    assert rested.rollout.reason.startswith("1 of 4 failed in phase 1; d0")
    assert rested.executions[-1].state is ExecutionState.CANCELED


@pytest.mark.parametrize("state", [RolloutState.PAUSED, RolloutState.AWAITING_APPROVAL])
def test_a_rollout_that_waits_for_a_person_still_guards_its_budget(state: RolloutState) -> None:
    waiting = failing(1, 4)
    rested = settled(replace(waiting, rollout=replace(waiting.rollout, state=state)), NOW)
    assert rested.rollout.state is RolloutState.ROLLING_BACK


def test_failures_that_a_person_advanced_past_are_not_held_against_what_follows() -> None:
    before = failing(2, 4, on_failure=OnFailure.PAUSE)
    passed = replace(before.rollout.phases[0], state=PhaseState.PASSED, finished_at=NOW)
    advanced = replace(before, rollout=replace(before.rollout, phases=(passed, before.rollout.phases[1])))
    assert settled(advanced, NOW + 1).rollout.state is RolloutState.RUNNING


def test_a_straggler_that_comes_back_and_fails_counts_against_the_phase_of_that_moment() -> None:
    late = saying(device("d0", assigned={MODEL: V2}), generation=2, phase="failed", outcome="rolled_back")
    running = rollout(PhaseState.PASSED, PhaseState.DEPLOYING, spec=a_spec(phases=(PhaseSpec(count=1),) * 2))
    parts = [told("d0"), replace(told("d1"), phase=1)]
    rested = settled(snapshot(running, parts, [late, device("d1", assigned={MODEL: V2})]), NOW + 10)
    assert rested.rollout.state is RolloutState.ROLLING_BACK


def test_a_rollout_that_paused_itself_waits_for_a_person() -> None:
    rested = settled(failing(1, 4, on_failure=OnFailure.PAUSE), NOW)
    assert rested.rollout.state is RolloutState.PAUSED
    assert rested.rollout.phases[0].state is PhaseState.FAILED
    assert rested.executions[-1].state is ExecutionState.QUEUED


# Going back


def going_back(*pairs: tuple[Execution, Device]) -> Snapshot:
    back = rollout(PhaseState.FAILED, state=RolloutState.ROLLING_BACK)
    return snapshot(back, [pair[0] for pair in pairs], [pair[1] for pair in pairs])


@pytest.mark.parametrize(
    "state",
    [
        ExecutionState.NOTIFIED,
        ExecutionState.IN_PROGRESS,
        ExecutionState.PROBATION,
        ExecutionState.SUCCEEDED,
        ExecutionState.FAILED,
    ],
)
def test_every_device_that_was_told_is_ordered_back(state: ExecutionState) -> None:
    (action,) = plan(going_back((told(state=state), device(assigned={MODEL: V2}, generation=2))), NOW)
    assert isinstance(action, Revert)
    assert (action.version, action.execution.generation) == (V1, 3)
    assert action.execution.state is ExecutionState.REVERTING


def test_a_device_that_a_newer_rollout_has_ordered_something_else_is_left_alone() -> None:
    rested = settled(going_back((told(state=ExecutionState.SUCCEEDED), device(assigned={MODEL: V3}))), NOW)
    assert rested.rollout.state is RolloutState.ROLLED_BACK


def test_a_device_that_ran_the_release_before_has_nothing_to_give_back() -> None:
    same = told(state=ExecutionState.SUCCEEDED, previous=V2)
    rested = settled(going_back((same, device(assigned={MODEL: V2}))), NOW)
    assert rested.rollout.state is RolloutState.ROLLED_BACK
    assert rested.executions[0].generation == same.generation


REVERTING = told(state=ExecutionState.REVERTING, generation=3)


def test_a_rollback_ends_when_those_that_can_be_reached_are_back() -> None:
    back = saying(device("d0"), generation=3, running=V1)
    awaited = saying(device("d1"), generation=2, running=V2)
    parts = (REVERTING, back), (replace(REVERTING, device=awaited.id), awaited)
    assert settled(going_back(*parts), NOW).rollout.state is RolloutState.ROLLING_BACK
    gone = (replace(REVERTING, device=awaited.id), replace(awaited, connected=False))
    rested = settled(going_back(parts[0], gone), NOW)
    assert rested.rollout.state is RolloutState.ROLLED_BACK
    assert "1 unreachable" in rested.rollout.reason


def test_a_device_that_is_still_at_work_is_not_back() -> None:
    at_work = saying(device(), generation=3, running=V1, phase="warming", target=V1)
    assert not plan(going_back((REVERTING, at_work)), NOW)


@pytest.mark.parametrize("outcome", ["failed", "rolled_back", "rejected"])
def test_a_device_that_cannot_go_back_does_not_hold_the_others_up(outcome: Outcome) -> None:
    stuck = saying(device(), generation=3, running=V2, phase="failed", outcome=outcome, update_version=V1)
    rested = settled(going_back((REVERTING, stuck)), NOW)
    assert rested.rollout.state is RolloutState.ROLLED_BACK
    assert rested.executions[0].state is ExecutionState.FAILED
    assert "could not go back to 1" in rested.executions[0].detail


def test_where_there_was_nothing_before_the_model_goes_out_of_service() -> None:
    first = told(state=ExecutionState.SUCCEEDED, previous=None)
    (action,) = plan(going_back((first, device(assigned={MODEL: V2}))), NOW)
    assert isinstance(action, Revert)
    assert action.version is None


def test_after_a_restart_a_rollback_gives_everybody_time_to_be_heard() -> None:
    unheard = saying(device(last_seen=NOW - 500), generation=2, running=V2)
    waiting = replace(going_back((REVERTING, unheard)), listening_since=NOW - 1)
    assert not plan(waiting, NOW)
    assert settled(waiting, NOW + 60).rollout.state is RolloutState.ROLLED_BACK


def test_a_snapshot_needs_only_the_devices_that_can_matter() -> None:
    running = rollout(PhaseState.PASSED, PhaseState.DEPLOYING, PhaseState.PENDING)
    parts = [
        told("done", ExecutionState.SUCCEEDED),
        told("late"),
        replace(told("now"), phase=1),
        Execution(device=device("later").id, phase=2),
    ]
    assert watched(running, parts) == ["late", "now"]


# Live requests


def test_a_device_that_compares_first_has_that_time_before_it_is_a_straggler() -> None:
    late = told(state=ExecutionState.IN_PROGRESS)
    comparing = saying(device(), generation=2, phase="shadowing", target=V2)
    for shadow, at, waits in (
        (None, 150, False),
        (ShadowSpec(for_s=1000), 1050, True),
        (ShadowSpec(for_s=10), 150, False),
    ):
        spec = a_spec(straggler_s=100, shadow=shadow)
        actions = plan(snapshot(rollout(PhaseState.DEPLOYING, spec=spec), [late], [comparing]), NOW + at)
        assert (actions == []) is waits, actions


def test_what_a_device_found_on_live_requests_is_told_when_it_serves_and_when_it_is_done() -> None:
    found = ShadowReport(verdict="pass", samples=40, agreed=39, dropped=2)
    for words, state in (
        (saying(device(), generation=2, phase="probation", target=V2, running=V2), ExecutionState.PROBATION),
        (saying(device(), generation=2, running=V2, outcome="succeeded"), ExecutionState.SUCCEEDED),
    ):
        assert words.reported
        (entry,) = words.reported.models
        update = entry.last_update and replace(entry.last_update, shadow=found)
        told_more = replace(entry, shadow=found, last_update=update)
        part = after(told(), replace(words, reported=replace(words.reported, models=(told_more,))))
        assert part.state is state
        assert part.detail.startswith("shadow pass: 97.5 % agree (39 of 40 requests, 2 dropped)")
