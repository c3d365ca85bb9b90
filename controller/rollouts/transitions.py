"""How rollouts, phases and executions move: three tables, and nothing else moves them.

Each table says for every (state, event) pair either where it moves or that it is ignored; a test proves that no pair is
missing or named twice, and the diagrams in docs/explanation/rollouts.md are drawn from here (see `diagrams`). An event
that is ignored changes nothing, which is what makes lost, late and repeated reports harmless. For what an operator asks
for, "ignored" means that `commands.act` refuses it.

    >>> EXECUTIONS.after(ExecutionState.NOTIFIED, ExecutionEvent.COMMITTED)
    <ExecutionState.SUCCEEDED: 'succeeded'>
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

from controller.rollouts.model import ExecutionState, PhaseState, RolloutState

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


class RolloutEvent(StrEnum):
    """What can happen to a rollout. The first group is decided by the planner, the second asked for by a person."""

    PREPARED = "prepared"
    APPROVAL_NEEDED = "approval needed"
    FINISHED = "last phase passed"
    TAKEN_BACK = "all reachable devices went back"
    SUPERSEDED = "newer rollout of the model"

    APPROVE = "approve"
    PAUSE = "pause"
    RESUME = "resume"
    ADVANCE = "advance"
    RETRY = "retry"
    ABORT = "abort"
    ROLLBACK = "rollback"


class PhaseEvent(StrEnum):
    """What can happen to a phase."""

    STARTED = "started"
    RESOLVED = "all but stragglers resolved"
    BAKED = "baked"
    BUDGET_SPENT = "error budget spent"
    ADVANCE = "advance"
    RETRY = "retry"


class ExecutionEvent(StrEnum):
    """What can happen to one device's part. The first group is what the device says of itself, or its silence."""

    WORKING = "device began"
    ACTIVATED = "device serves the release"
    COMMITTED = "device kept the release"
    GAVE_UP = "device gave up or went back"
    WENT_SILENT = "silent after activation"
    REVERTED = "device went back as ordered"
    REVERT_FAILED = "device could not go back"

    ORDERED = "order made"
    REVERT_ORDERED = "order to go back made"
    CANCELED = "not to be told"
    SUPERSEDED = "newer rollout of the model"
    RETRY = "retry"


class Table(Generic[S, E]):
    """One state machine. `moves` and `ignored` together name every pair of `states` and `events` exactly once."""

    def __init__(self, name: str, initial: S, events: type[E], rows: Mapping[S, tuple[Mapping[E, S], set[E]]]) -> None:
        self.name = name
        self.initial = initial
        self.states: tuple[S, ...] = tuple(type(initial))
        self.events: tuple[E, ...] = tuple(events)
        self.moves = {(state, event): to for state, (moves, _) in rows.items() for event, to in moves.items()}
        self.ignored = frozenset((state, event) for state, (_, ignored) in rows.items() for event in ignored)

    def after(self, state: S, event: E) -> S | None:
        """The state that `event` leads to, or None where it is ignored."""
        return self.moves.get((state, event))


R, RE = RolloutState, RolloutEvent
P, PE = PhaseState, PhaseEvent
X, XE = ExecutionState, ExecutionEvent

ROLLOUTS: Table[RolloutState, RolloutEvent] = Table(
    "rollout",
    R.PREPARING,
    RolloutEvent,
    {
        R.PREPARING: (
            {
                RE.PREPARED: R.RUNNING,
                RE.PAUSE: R.PAUSED,
                RE.ABORT: R.ABORTED,
                RE.ROLLBACK: R.ROLLING_BACK,
                RE.SUPERSEDED: R.ABORTED,
            },
            {RE.APPROVAL_NEEDED, RE.FINISHED, RE.TAKEN_BACK, RE.APPROVE, RE.RESUME, RE.ADVANCE, RE.RETRY},
        ),
        R.AWAITING_APPROVAL: (
            {
                RE.APPROVE: R.RUNNING,
                RE.PAUSE: R.PAUSED,
                RE.ABORT: R.ABORTED,
                RE.ROLLBACK: R.ROLLING_BACK,
                RE.SUPERSEDED: R.ABORTED,
            },
            {RE.PREPARED, RE.APPROVAL_NEEDED, RE.FINISHED, RE.TAKEN_BACK, RE.RESUME, RE.ADVANCE, RE.RETRY},
        ),
        R.RUNNING: (
            {
                RE.APPROVAL_NEEDED: R.AWAITING_APPROVAL,
                RE.FINISHED: R.SUCCEEDED,
                RE.PAUSE: R.PAUSED,
                RE.ADVANCE: R.RUNNING,
                RE.RETRY: R.RUNNING,
                RE.ABORT: R.ABORTED,
                RE.ROLLBACK: R.ROLLING_BACK,
                RE.SUPERSEDED: R.ABORTED,
            },
            {RE.PREPARED, RE.TAKEN_BACK, RE.APPROVE, RE.RESUME},
        ),
        R.PAUSED: (
            {
                RE.RESUME: R.RUNNING,
                RE.ADVANCE: R.RUNNING,
                RE.RETRY: R.RUNNING,
                RE.ABORT: R.ABORTED,
                RE.ROLLBACK: R.ROLLING_BACK,
                RE.SUPERSEDED: R.ABORTED,
            },
            {RE.PREPARED, RE.APPROVAL_NEEDED, RE.FINISHED, RE.TAKEN_BACK, RE.APPROVE, RE.PAUSE},
        ),
        R.SUCCEEDED: ({RE.ROLLBACK: R.ROLLING_BACK}, set(RE) - {RE.ROLLBACK}),
        R.ABORTED: ({RE.ROLLBACK: R.ROLLING_BACK}, set(RE) - {RE.ROLLBACK}),
        R.ROLLING_BACK: (
            {RE.TAKEN_BACK: R.ROLLED_BACK, RE.ABORT: R.ABORTED},
            set(RE) - {RE.TAKEN_BACK, RE.ABORT},
        ),
        R.ROLLED_BACK: ({}, set(RE)),
    },
)

PHASES: Table[PhaseState, PhaseEvent] = Table(
    "phase",
    P.PENDING,
    PhaseEvent,
    {
        P.PENDING: ({PE.STARTED: P.DEPLOYING}, set(PE) - {PE.STARTED}),
        P.DEPLOYING: (
            {PE.RESOLVED: P.BAKING, PE.BUDGET_SPENT: P.FAILED, PE.ADVANCE: P.PASSED, PE.RETRY: P.DEPLOYING},
            {PE.STARTED, PE.BAKED},
        ),
        P.BAKING: (
            {PE.BAKED: P.PASSED, PE.BUDGET_SPENT: P.FAILED, PE.ADVANCE: P.PASSED, PE.RETRY: P.DEPLOYING},
            {PE.STARTED, PE.RESOLVED},
        ),
        # A straggler may come back, and fail, after its phase has passed and before the next one is approved.
        P.PASSED: ({PE.BUDGET_SPENT: P.FAILED}, set(PE) - {PE.BUDGET_SPENT}),
        P.FAILED: (
            {PE.ADVANCE: P.PASSED, PE.RETRY: P.DEPLOYING},
            {PE.STARTED, PE.RESOLVED, PE.BAKED, PE.BUDGET_SPENT},
        ),
    },
)

_TOLD: dict[ExecutionEvent, ExecutionState] = {
    XE.COMMITTED: X.SUCCEEDED,
    XE.GAVE_UP: X.FAILED,
    XE.REVERT_ORDERED: X.REVERTING,
    XE.SUPERSEDED: X.SUPERSEDED,
}
"""Moves of every device that has its order and has not resolved."""

EXECUTIONS: Table[ExecutionState, ExecutionEvent] = Table(
    "execution",
    X.QUEUED,
    ExecutionEvent,
    {
        X.QUEUED: (
            {XE.ORDERED: X.NOTIFIED, XE.CANCELED: X.CANCELED, XE.SUPERSEDED: X.SUPERSEDED},
            set(XE) - {XE.ORDERED, XE.CANCELED, XE.SUPERSEDED},
        ),
        X.NOTIFIED: (
            {**_TOLD, XE.WORKING: X.IN_PROGRESS, XE.ACTIVATED: X.PROBATION},
            {XE.WENT_SILENT, XE.REVERTED, XE.REVERT_FAILED, XE.ORDERED, XE.CANCELED, XE.RETRY},
        ),
        X.IN_PROGRESS: (
            {**_TOLD, XE.ACTIVATED: X.PROBATION},
            {XE.WORKING, XE.WENT_SILENT, XE.REVERTED, XE.REVERT_FAILED, XE.ORDERED, XE.CANCELED, XE.RETRY},
        ),
        X.PROBATION: (
            {**_TOLD, XE.WENT_SILENT: X.FAILED},
            {XE.WORKING, XE.ACTIVATED, XE.REVERTED, XE.REVERT_FAILED, XE.ORDERED, XE.CANCELED, XE.RETRY},
        ),
        X.SUCCEEDED: (
            {XE.WENT_SILENT: X.FAILED, XE.REVERT_ORDERED: X.REVERTING},
            set(XE) - {XE.WENT_SILENT, XE.REVERT_ORDERED},
        ),
        X.FAILED: (
            {XE.RETRY: X.QUEUED, XE.REVERT_ORDERED: X.REVERTING},
            set(XE) - {XE.RETRY, XE.REVERT_ORDERED},
        ),
        X.REVERTING: (
            {XE.REVERTED: X.ROLLED_BACK, XE.REVERT_FAILED: X.FAILED, XE.SUPERSEDED: X.SUPERSEDED},
            set(XE) - {XE.REVERTED, XE.REVERT_FAILED, XE.SUPERSEDED},
        ),
        X.ROLLED_BACK: ({}, set(XE)),
        X.CANCELED: ({}, set(XE)),
        X.SUPERSEDED: ({}, set(XE)),
    },
)
