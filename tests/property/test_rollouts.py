"""Properties of rollouts that hold for every fleet, every phase list and every order of messages."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.ids import DeviceId
from controller.rollouts.lifecycle import moved
from controller.rollouts.membership import phase_of_each, position, reach
from controller.rollouts.model import (
    TERMINAL_EXECUTION_STATES,
    ErrorBudget,
    Execution,
    ExecutionState,
    PhaseSpec,
    PhaseState,
    RolloutState,
)
from controller.rollouts.observation import observed
from controller.rollouts.planner import Notify, plan
from controller.rollouts.transitions import EXECUTIONS, ExecutionEvent
from tests.unit.fleet import NOW, V1, V2, a_spec, device, rollout, saying, settled, snapshot, told

NAMES = st.sets(st.integers(0, 10_000), min_size=1, max_size=60).map(lambda ids: [DeviceId(f"d{id_}") for id_ in ids])
PERCENTS = st.sets(st.floats(0.01, 99.99), max_size=5).map(lambda values: [*sorted(values), 100.0])
PHASES = PERCENTS.map(lambda values: tuple(PhaseSpec(percent=value) for value in values))
SALTS = st.text("abcdef", max_size=4)


@given(SALTS, NAMES, PHASES)
def test_every_device_has_a_phase_and_every_phase_its_exact_size(
    salt: str, names: list[DeviceId], phases: tuple[PhaseSpec, ...]
) -> None:
    placed = phase_of_each(salt, names, phases, {})
    assert set(placed) == set(names)
    for index, phase in enumerate(phases):
        assert sum(of <= index for of in placed.values()) == reach(phase, len(names))
    assert min(placed.values()) == 0


@given(SALTS, NAMES, PHASES)
def test_a_wider_phase_keeps_everybody_and_follows_the_hash(
    salt: str, names: list[DeviceId], phases: tuple[PhaseSpec, ...]
) -> None:
    placed = phase_of_each(salt, names, phases, {})
    ranked = sorted(names, key=lambda name: position(salt, name))
    assert all(placed[nearer] <= placed[farther] for nearer, farther in pairwise(ranked))


@given(SALTS, st.integers(0, 10**9))
def test_a_position_is_in_the_unit_interval(salt: str, number: int) -> None:
    assert 0 <= position(salt, DeviceId(f"d{number}")) < 1


@given(st.lists(st.sampled_from(ExecutionEvent), max_size=30))
def test_an_execution_goes_only_where_the_table_says(events: list[ExecutionEvent]) -> None:
    execution = Execution(device=DeviceId("d0"), phase=0)
    for event in events:
        after = moved(execution, event, NOW)
        assert after.state is (EXECUTIONS.after(execution.state, event) or execution.state)
        execution = after


WORDS = st.fixed_dictionaries(
    {
        "running": st.sampled_from([None, V1, V2]),
        "phase": st.sampled_from(["idle", "fetching", "warming", "replacing", "probation", "failed"]),
        "target": st.sampled_from([None, V2]),
        "generation": st.integers(1, 4),
        "outcome": st.sampled_from([None, "succeeded", "failed", "rolled_back", "rejected"]),
        "update_version": st.sampled_from([V1, V2]),
    }
)


@given(st.lists(WORDS, min_size=1, max_size=8), st.sampled_from(ExecutionState))
def test_hearing_the_same_report_again_changes_nothing(words: list[dict[str, object]], start: ExecutionState) -> None:
    execution = told(state=start)
    for word in words:
        report = saying(device(), **word)  # type: ignore[arg-type]  # the strategy gives what `saying` takes
        execution = observed(execution, report, a_spec().release, NOW)
        assert observed(execution, report, a_spec().release, NOW + 5) == execution
    if start in TERMINAL_EXECUTION_STATES:
        assert execution.state is start


@given(
    st.lists(st.sampled_from(ExecutionState), min_size=1, max_size=20),
    st.integers(0, 3),
    st.sampled_from([state for state in RolloutState if state is not RolloutState.RUNNING]),
)
def test_nobody_is_told_unless_the_rollout_runs(states: list[ExecutionState], budget: int, state: RolloutState) -> None:
    parts = [told(f"d{number}", of, finished_at=NOW) for number, of in enumerate(states)]
    spec = a_spec(error_budget=ErrorBudget(count=budget))
    stopped = snapshot(
        rollout(PhaseState.DEPLOYING, state=state, spec=spec), parts, [device(part.device) for part in parts]
    )
    assert not any(isinstance(action, Notify) for action in plan(stopped, NOW))


@given(st.lists(st.sampled_from(ExecutionState), min_size=1, max_size=20), st.sampled_from(RolloutState))
def test_the_planner_always_comes_to_rest(states: list[ExecutionState], state: RolloutState) -> None:
    parts = [replace(told(f"d{number}", of), activated_at=NOW, finished_at=NOW) for number, of in enumerate(states)]
    start = snapshot(rollout(PhaseState.DEPLOYING, state=state), parts, [device(part.device) for part in parts])
    for moment in (NOW, NOW + 1000):
        rested = settled(start, moment)
        assert plan(rested, moment) == []
