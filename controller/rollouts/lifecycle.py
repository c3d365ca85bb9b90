"""Moving rollouts, phases and executions along `transitions`, with the times and reasons that go with a move.

Every function gives a new value, or the same one where the table ignores the event. `revised` is the only place where a
rollout's revision grows.
"""

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from controller.rollouts.model import (
    TERMINAL_ROLLOUT_STATES,
    Execution,
    ExecutionState,
    Phase,
    PhaseState,
    Rollout,
)
from controller.rollouts.transitions import (
    EXECUTIONS,
    PHASES,
    ROLLOUTS,
    ExecutionEvent,
    PhaseEvent,
    RolloutEvent,
)

_RESOLVING = frozenset(
    {
        ExecutionEvent.COMMITTED,
        ExecutionEvent.GAVE_UP,
        ExecutionEvent.WENT_SILENT,
        ExecutionEvent.REVERTED,
        ExecutionEvent.REVERT_FAILED,
        ExecutionEvent.CANCELED,
        ExecutionEvent.SUPERSEDED,
    }
)


def moved(execution: Execution, event: ExecutionEvent, now: float, **changes: Any) -> Execution:
    """The execution after `event` at `now`; `changes` are other fields that change with it."""
    state = EXECUTIONS.after(execution.state, event)
    if state is None:
        return execution
    if event in _RESOLVING:
        changes["finished_at"] = now
    if event in {ExecutionEvent.ACTIVATED, ExecutionEvent.COMMITTED} and execution.activated_at is None:
        changes["activated_at"] = now
    return replace(execution, state=state, **changes)


def revised(rollout: Rollout, now: float, event: RolloutEvent | None = None, **changes: Any) -> Rollout:
    """The rollout with `changes`, after `event` if one is given (and is not ignored)."""
    state = (ROLLOUTS.after(rollout.state, event) if event else None) or rollout.state
    finished_at = (rollout.finished_at or now) if state in TERMINAL_ROLLOUT_STATES else None
    return replace(rollout, state=state, finished_at=finished_at, revision=rollout.revision + 1, **changes)


def phases_after(
    rollout: Rollout, index: int, event: PhaseEvent, now: float, reason: str = "", **changes: Any
) -> tuple[Phase, ...]:
    """The rollout's phases after `event` has happened to the one at `index`."""
    phase = rollout.phases[index]
    state = PHASES.after(phase.state, event)
    if state is None:
        return rollout.phases
    match state:
        case PhaseState.DEPLOYING:
            changes |= {"started_at": phase.started_at or now, "baking_since": None, "finished_at": None}
        case PhaseState.BAKING:
            changes |= {"baking_since": now}
        case PhaseState.PASSED | PhaseState.FAILED:
            changes |= {"finished_at": now}
        case PhaseState.PENDING:
            pass
    after = replace(phase, state=state, reason=reason, **changes)
    return (*rollout.phases[:index], after, *rollout.phases[index + 1 :])


def current_phase(rollout: Rollout) -> int | None:
    """The index of the first phase that has not passed; None when all have."""
    return next((phase.index for phase in rollout.phases if phase.state is not PhaseState.PASSED), None)


def judged_phase(rollout: Rollout) -> int | None:
    """The index of the newest phase that has begun: the one whose error budget a failure uses up."""
    return max((phase.index for phase in rollout.phases if phase.state is not PhaseState.PENDING), default=None)


def with_queued_canceled(executions: Iterable[Execution], now: float, reason: str) -> list[Execution]:
    """Those executions that were still queued, canceled."""
    return [
        moved(execution, ExecutionEvent.CANCELED, now, reason=reason)
        for execution in executions
        if execution.state is ExecutionState.QUEUED
    ]
