"""The three tables say what happens to every pair of state and event, once."""

from itertools import product
from typing import Any

import pytest

from controller.rollouts.commands import Action
from controller.rollouts.diagrams import TABLES
from controller.rollouts.model import TERMINAL_EXECUTION_STATES, ExecutionState, OnFailure
from controller.rollouts.planner import STOP_EVENTS
from controller.rollouts.transitions import EXECUTIONS, ROLLOUTS, ExecutionEvent, RolloutEvent, Table


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_pair_moves_or_is_ignored_and_none_does_both(table: Table[Any, Any]) -> None:
    every = set(product(table.states, table.events))
    assert set(table.moves) | table.ignored == every
    assert not set(table.moves) & table.ignored


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_state_can_be_reached(table: Table[Any, Any]) -> None:
    reached = {table.initial}
    for _ in table.states:
        reached |= {to for (state, _), to in table.moves.items() if state in reached}
    assert reached == set(table.states)


def test_what_a_device_says_after_its_part_has_ended_changes_nothing() -> None:
    words = {ExecutionEvent.WORKING, ExecutionEvent.ACTIVATED, ExecutionEvent.COMMITTED, ExecutionEvent.GAVE_UP}
    for state, event in product(TERMINAL_EXECUTION_STATES, words):
        assert EXECUTIONS.after(state, event) is None
    assert EXECUTIONS.after(ExecutionState.QUEUED, ExecutionEvent.COMMITTED) is None


def test_every_action_and_every_way_to_stop_is_an_event_of_rollouts() -> None:
    assert {RolloutEvent(action) for action in Action.__args__} <= set(ROLLOUTS.events)  # type: ignore[attr-defined]
    assert set(STOP_EVENTS) == set(OnFailure)
