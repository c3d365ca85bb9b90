"""What people may do to a rollout, and what they are told when they may not."""

import pytest
from msgspec.structs import replace

from common.errors import Conflict, InvalidInput, NotFound
from controller.rollouts.commands import Action, Created, Part, act, create, refuse_rollback_over
from controller.rollouts.model import ExecutionState, PhaseSpec, PhaseState, RolloutSpec, RolloutState
from tests.unit.fleet import NOW, V1, a_spec, device, rollout, told

FLEET = [device(f"d{number}") for number in range(4)]


def created(spec: RolloutSpec | None = None, active: tuple[Part, ...] = (), known: bool = True) -> Created:
    return create(
        spec or a_spec(), FLEET, now=NOW, id="r2", salt="s", actor="ann", exists=lambda _ref: known, active=active
    )


def test_a_new_rollout_prepares_and_has_told_nobody() -> None:
    new = created(a_spec(phases=(PhaseSpec(percent=25), PhaseSpec(percent=100))))
    assert new.rollout.state is RolloutState.PREPARING
    assert [phase.state for phase in new.rollout.phases] == [PhaseState.PENDING] * 2
    assert sorted(one.phase for one in new.executions) == [0, 1, 1, 1]
    assert {one.state for one in new.executions} == {ExecutionState.QUEUED}


def test_an_unknown_release_is_not_found() -> None:
    with pytest.raises(NotFound, match="release m@2 does not exist"):
        created(known=False)


def test_a_selector_that_matches_nobody_is_refused() -> None:
    with pytest.raises(InvalidInput) as refused:
        created(a_spec(selector='labels.site == "atlantis"'))
    assert refused.value.field == "selector"


def test_a_newer_rollout_supersedes_one_that_shares_a_device() -> None:
    older = rollout(PhaseState.DEPLOYING)
    parts = [told("d0"), told("d1", ExecutionState.SUCCEEDED), told("elsewhere")]
    ((ended, changed),) = created(active=((older, parts),)).superseded
    assert ended.state is RolloutState.ABORTED
    assert ended.reason == "superseded by rollout r2"
    assert {one.device: one.state for one in changed} == {
        "d0": ExecutionState.SUPERSEDED,
        "elsewhere": ExecutionState.SUPERSEDED,
    }


def test_a_rollout_of_other_devices_goes_on() -> None:
    assert not created(active=((rollout(), [told("elsewhere")]),)).superseded


def test_what_to_give_back_is_what_was_there_before_an_unproven_release() -> None:
    parts = [told("d0"), told("d1", ExecutionState.SUCCEEDED)]
    by_name = {str(one.device): one for one in created(active=((rollout(), parts),)).executions}
    assert (by_name["d0"].previous, by_name["d0"].generation) == (V1, 2)
    assert by_name["d1"].generation == 0


def test_a_rollout_that_goes_back_is_not_superseded() -> None:
    with pytest.raises(Conflict, match="is rolling back"):
        created(active=((rollout(state=RolloutState.ROLLING_BACK), [told("d0")]),))


@pytest.mark.parametrize(
    ("state", "action"),
    [
        (RolloutState.RUNNING, "approve"),
        (RolloutState.RUNNING, "resume"),
        (RolloutState.PAUSED, "pause"),
        (RolloutState.SUCCEEDED, "abort"),
        (RolloutState.ROLLED_BACK, "rollback"),
        (RolloutState.ROLLING_BACK, "rollback"),
        (RolloutState.AWAITING_APPROVAL, "advance"),
    ],
)
def test_an_action_that_makes_no_sense_now_is_refused_with_what_does(state: RolloutState, action: Action) -> None:
    with pytest.raises(Conflict) as refused:
        act(rollout(state=state), [], action, NOW)
    assert refused.value.fix


def test_approval_is_for_the_next_phase_only() -> None:
    waiting = rollout(PhaseState.PASSED, PhaseState.PENDING, PhaseState.PENDING, state=RolloutState.AWAITING_APPROVAL)
    after, _ = act(waiting, [], "approve", NOW)
    assert after.state is RolloutState.RUNNING
    assert [phase.approved for phase in after.phases] == [False, True, False]
    assert after.revision == waiting.revision + 1


def test_aborting_cancels_those_that_were_not_told_and_leaves_the_others() -> None:
    after, changed = act(rollout(), [told("d0"), told("d1", ExecutionState.QUEUED)], "abort", NOW)
    assert after.state is RolloutState.ABORTED
    assert after.finished_at == NOW
    assert [(one.device, one.state) for one in changed] == [("d1", ExecutionState.CANCELED)]


def test_advancing_passes_the_phase_that_is_under_way() -> None:
    after, _ = act(rollout(PhaseState.BAKING, PhaseState.PENDING), [], "advance", NOW)
    assert [phase.state for phase in after.phases] == [PhaseState.PASSED, PhaseState.PENDING]
    with pytest.raises(Conflict, match="no phase is under way"):
        act(after, [], "advance", NOW)


def test_a_failed_phase_is_not_resumed_but_retried() -> None:
    stopped = rollout(PhaseState.FAILED, state=RolloutState.PAUSED)
    failed = told("d0", ExecutionState.FAILED, reason="unhealthy", finished_at=NOW)
    with pytest.raises(Conflict, match="phase 1 has failed"):
        act(stopped, [failed], "resume", NOW)
    after, (again,) = act(stopped, [failed], "retry", NOW)
    assert (after.state, after.phases[0].state) == (RolloutState.RUNNING, PhaseState.DEPLOYING)
    assert (again.state, again.attempt, again.reason, again.previous) == (ExecutionState.QUEUED, 2, "", V1)


def test_a_retry_needs_a_failure() -> None:
    with pytest.raises(Conflict, match="no device has failed"):
        act(rollout(), [told("d0")], "retry", NOW)


def test_a_rollout_that_has_ended_can_be_taken_back_unless_a_newer_one_has_its_devices() -> None:
    done = rollout(PhaseState.PASSED, state=RolloutState.SUCCEEDED)
    parts = [told("d0", ExecutionState.SUCCEEDED)]
    after, _ = act(done, parts, "rollback", NOW)
    assert (after.state, after.finished_at) == (RolloutState.ROLLING_BACK, None)
    newer = replace(rollout(), id="r9")
    with pytest.raises(Conflict, match="r9"):
        refuse_rollback_over(done, parts, [(newer, [told("d0")])])
    refuse_rollback_over(done, parts, [(newer, [told("d3")]), (done, parts)])


def test_a_fleet_without_devices_is_told_apart_from_a_selector_that_matches_none() -> None:
    with pytest.raises(InvalidInput, match="the fleet has no devices") as refused:
        create(a_spec(), [], now=NOW, id="r1", salt="s", actor="ann", exists=lambda _ref: True)
    assert "token create" in str(refused.value.fix)
