"""Where a phase stands: who has resolved, who is still waited for, and whether its error budget is spent.

Three verdicts are possible, and "no data" is none of the good ones: a phase in which nobody resolved does not pass. A
straggler (told, not activated, out of time) is neither a success nor a failure and is not waited for. Failures count
against the newest phase that has begun: those of its own devices, and those that devices of earlier phases had since.
"""

from collections.abc import Iterable

import msgspec

from controller.rollouts.model import ErrorBudget, Execution, ExecutionState, Phase, PhaseState
from controller.rollouts.observation import is_straggler

RESOLVED = frozenset({ExecutionState.SUCCEEDED, ExecutionState.FAILED})
IN_FLIGHT = frozenset({ExecutionState.NOTIFIED, ExecutionState.IN_PROGRESS, ExecutionState.PROBATION})
OPEN = IN_FLIGHT | {ExecutionState.REVERTING}
"""Told, and not heard the end of."""
OUT = frozenset({ExecutionState.CANCELED, ExecutionState.SUPERSEDED})
"""No longer part of the rollout."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of devices. `own` are the devices that the phase added, `waiting` everybody it still waits for."""

    own: int
    own_resolved: int
    waiting: int
    stragglers: int
    resolved: int
    failed: int
    resolved_ever: int


def standing(
    phase: Phase, executions: Iterable[Execution], straggler_s: float, listening_since: float | None, now: float
) -> Standing:
    """How the phase stands at `now`."""
    members = [one for one in executions if one.phase <= phase.index and one.state not in OUT]
    own = [one for one in members if one.phase == phase.index]
    late = [one for one in members if is_straggler(one, straggler_s, listening_since, now)]
    open_ends = sum(one.state in IN_FLIGHT or one.state is ExecutionState.QUEUED for one in members)
    counted = [one for one in members if one.state in RESOLVED and _counts(one, phase)]
    return Standing(
        own=len(own),
        own_resolved=sum(one.state in RESOLVED for one in own),
        waiting=open_ends - len(late),
        stragglers=len(late),
        resolved=len(counted),
        failed=sum(one.state is ExecutionState.FAILED for one in counted),
        resolved_ever=sum(one.state in RESOLVED for one in members),
    )


def budget_spent(budget: ErrorBudget, standing: Standing) -> bool:
    """Whether more devices failed than the budget tolerates."""
    if standing.failed <= budget.count:
        return False
    conclusive = budget.percent == 0 or standing.resolved >= budget.minimum or standing.waiting == 0
    return conclusive and standing.failed > budget.percent / 100 * standing.resolved


def has_evidence(standing: Standing) -> bool:
    """Whether anybody can say that the release works; a phase that adds no device rests on those before it."""
    return standing.resolved_ever > 0 and (standing.own_resolved > 0 or standing.own == 0)


def _counts(execution: Execution, phase: Phase) -> bool:
    """Whether the end of this execution happened under this phase."""
    finished_at = execution.finished_at or 0.0
    if phase.state is PhaseState.PASSED:
        # A person may have advanced past failures; only what came after that is news.
        return finished_at > (phase.finished_at or 0.0)
    return execution.phase == phase.index or finished_at >= (phase.started_at or 0.0)
