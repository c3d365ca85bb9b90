"""What people do to rollouts: create one, and act on it. Pure: checks, then new values; the caller stores them.

A model on a device is moved by one rollout at a time. A new rollout that shares a device with an active one of the same
model supersedes it: the older one ends, and its devices stay as they are until the newer one tells them. Only one that
is being rolled back cannot be superseded, because then some devices would never be told to go back.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Literal, get_args

import msgspec
from msgspec.structs import replace

from common.errors import Conflict, NotFound
from common.ids import DeviceId, ReleaseRef
from controller.devices import Device
from controller.rollouts.lifecycle import current_phase, moved, phases_after, revised, with_queued_canceled
from controller.rollouts.membership import draw, select_some
from controller.rollouts.model import (
    Execution,
    ExecutionState,
    Phase,
    PhaseState,
    Rollout,
    RolloutSpec,
    RolloutState,
)
from controller.rollouts.transitions import ROLLOUTS, ExecutionEvent, PhaseEvent, RolloutEvent

Action = Literal["approve", "pause", "resume", "advance", "abort", "rollback", "retry"]

Part = tuple[Rollout, Sequence[Execution]]
"""A rollout with its executions."""


class Created(msgspec.Struct, frozen=True, kw_only=True):
    """A new rollout, and the older ones that it ends, with those of their executions that changed."""

    rollout: Rollout
    executions: list[Execution]
    superseded: list[tuple[Rollout, list[Execution]]]


def create(
    spec: RolloutSpec,
    devices: Iterable[Device],
    *,
    now: float,
    id: str,  # noqa: A002 - it is the id, and it is keyword-only
    salt: str,
    actor: str,
    exists: Callable[[ReleaseRef], bool],
    active: Iterable[Part] = (),
    traceparent: str | None = None,
) -> Created:
    """A rollout of `spec` over those of `devices` that its selector matches at `now`.

    `active` are the rollouts that have not ended. Raises `NotFound` for an unknown release, `InvalidInput` for a bad
    selector or phases, `Conflict` when an overlapping rollout is being rolled back.
    """
    if not exists(spec.release):
        fix = "publish it first: ferry release publish"
        raise NotFound(f"release {spec.release} does not exist", field="release", fix=fix)
    matched = select_some(spec.selector, devices, now)
    placed = draw(salt, matched, spec.phases, now)
    rollout = Rollout(
        id=id,
        spec=spec,
        salt=salt,
        created_at=now,
        created_by=actor,
        phases=tuple(Phase(index=index) for index in range(len(spec.phases))),
        traceparent=traceparent,
    )
    rivals = _rivals(active, spec.release, placed.keys())
    for rival, _ in rivals:
        if ROLLOUTS.after(rival.state, RolloutEvent.SUPERSEDED) is None:
            fix = "wait until it has ended, or abort it"
            raise Conflict(f"rollout {rival.id} of {rival.spec.release} is {_words(rival.state)}", fix=fix)
    taken_over = {one.device: one for _, executions in rivals for one in executions if _is_unproven(one)}
    return Created(
        rollout=rollout,
        executions=[_queued(device, placed[device], taken_over.get(device)) for device in sorted(placed)],
        superseded=[_superseded(part, id, now) for part in rivals],
    )


def act(
    rollout: Rollout, executions: Sequence[Execution], action: Action, now: float
) -> tuple[Rollout, list[Execution]]:
    """The rollout after a person's `action`, and those of its executions that changed.

    Raises `Conflict`, with what to do instead, when the action makes no sense in the present state.
    """
    event = RolloutEvent(action)
    if ROLLOUTS.after(rollout.state, event) is None:
        raise Conflict(f"cannot {action} a rollout that is {_words(rollout.state)}", fix=_alternatives(rollout.state))
    match event:
        case RolloutEvent.APPROVE:
            return _approve(rollout, now), []
        case RolloutEvent.RESUME:
            return _resume(rollout, now), []
        case RolloutEvent.ADVANCE:
            return _advance(rollout, now), []
        case RolloutEvent.RETRY:
            return _retry(rollout, executions, now)
        case RolloutEvent.ABORT | RolloutEvent.ROLLBACK:
            canceled = with_queued_canceled(executions, now, "the rollout ended first")
            reason = "aborted" if event is RolloutEvent.ABORT else "taken back on request"
            return revised(rollout, now, event, reason=reason), canceled
        case _:
            return revised(rollout, now, event, reason="paused on request"), []


def refuse_rollback_over(rollout: Rollout, executions: Sequence[Execution], active: Iterable[Part]) -> None:
    """`Conflict` when taking `rollout` back would pull devices from under another active rollout of its model."""
    devices = {execution.device for execution in executions}
    for rival, _ in _rivals(active, rollout.spec.release, devices):
        if rival.id != rollout.id:
            fix = f"abort or roll back {rival.id} first"
            raise Conflict(f"rollout {rival.id} of {rival.spec.release} has some of its devices", fix=fix)


def _approve(rollout: Rollout, now: float) -> Rollout:
    index = current_phase(rollout) or 0
    phases = (*rollout.phases[:index], replace(rollout.phases[index], approved=True), *rollout.phases[index + 1 :])
    return revised(rollout, now, RolloutEvent.APPROVE, phases=phases, reason="")


def _resume(rollout: Rollout, now: float) -> Rollout:
    index = current_phase(rollout)
    if index is not None and rollout.phases[index].state is PhaseState.FAILED:
        fix = "retry the failed devices, advance past them, roll back or abort"
        raise Conflict(f"phase {index + 1} has failed: {rollout.phases[index].reason}", fix=fix)
    return revised(rollout, now, RolloutEvent.RESUME, reason="")


def _advance(rollout: Rollout, now: float) -> Rollout:
    index = current_phase(rollout)
    if index is None or rollout.phases[index].state is PhaseState.PENDING:
        raise Conflict("no phase is under way", fix="wait for the next phase to begin, or resume")
    phases = phases_after(rollout, index, PhaseEvent.ADVANCE, now, "advanced on request")
    return revised(rollout, now, RolloutEvent.ADVANCE, phases=phases, reason="")


def _retry(rollout: Rollout, executions: Sequence[Execution], now: float) -> tuple[Rollout, list[Execution]]:
    index = current_phase(rollout)
    failed = [one for one in executions if one.state is ExecutionState.FAILED]
    if index is None or not failed:
        raise Conflict("no device has failed", fix="retry is for failed devices; stragglers need none")
    phases = phases_after(rollout, index, PhaseEvent.RETRY, now)
    return revised(rollout, now, RolloutEvent.RETRY, phases=phases, reason=""), [_again(one, now) for one in failed]


def _again(execution: Execution, now: float) -> Execution:
    return moved(
        execution,
        ExecutionEvent.RETRY,
        now,
        attempt=execution.attempt + 1,
        activated_at=None,
        finished_at=None,
        reason="",
        detail="",
    )


def _queued(device: DeviceId, phase: int, taken_over: Execution | None) -> Execution:
    fresh = Execution(device=device, phase=phase)
    if taken_over is None:
        return fresh
    # The release that the older rollout put here is unproven: what to give back is what was there before it.
    previous, chosen = taken_over.previous, taken_over.previous_chosen
    return replace(fresh, previous=previous, previous_chosen=chosen, generation=taken_over.generation)


def _is_unproven(execution: Execution) -> bool:
    return execution.generation > 0 and execution.state is not ExecutionState.SUCCEEDED


def _rivals(active: Iterable[Part], release: ReleaseRef, devices: Set[DeviceId]) -> list[Part]:
    """The rollouts of the same model that have some of these devices."""
    same_model = [part for part in active if part[0].spec.release.model == release.model]
    return [part for part in same_model if any(one.device in devices for one in part[1])]


def _superseded(part: Part, by: str, now: float) -> tuple[Rollout, list[Execution]]:
    rollout, executions = part
    reason = f"superseded by rollout {by}"
    after = [moved(execution, ExecutionEvent.SUPERSEDED, now, reason=reason) for execution in executions]
    changed = [new for old, new in zip(executions, after, strict=True) if new is not old]
    return revised(rollout, now, RolloutEvent.SUPERSEDED, reason=reason), changed


def _words(state: RolloutState) -> str:
    return state.value.replace("_", " ")


def _alternatives(state: RolloutState) -> str:
    possible = [action for action in get_args(Action) if ROLLOUTS.after(state, RolloutEvent(action)) is not None]
    return f"possible now: {', '.join(possible)}" if possible else "create a new rollout"
