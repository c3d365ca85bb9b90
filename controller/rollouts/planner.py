"""What to do next about one rollout: `plan(snapshot, now) -> actions`.

A snapshot holds everything a decision needs; the actions are values that the reconciler commits in one transaction. A
plan takes at most one step of the rollout's own state machine, so the reconciler plans again until nothing is left to
do; planning the same snapshot again gives the same actions, so it does not matter where it was interrupted.

The rules, in the order in which they are applied:

1. Executions follow what their devices report (`observation`); activated devices that went silent have failed.
2. If the error budget of the newest phase is spent, the rollout stops now, whatever else it was about to do.
3. Otherwise the current phase goes on: begin (or ask for approval), tell its devices, wait until all but stragglers
   have resolved, bake, pass.
4. A rollback orders every device that was ever told back to what it ran before, and ends when all that can be reached
   have obeyed; the others find the order when they come back.
5. When a rollout has ended, devices that come back late are still heard, and nothing else is done.
6. Whenever there is nothing else to do, devices that wait for a cheaper way than their byte budget allows are told of
   one that there is by now.
"""

from collections.abc import Callable, Iterable, Mapping

import msgspec
from msgspec.structs import replace

from common.artifact.manifest import ReleaseManifest
from common.ids import DeviceId, Version
from common.wire.messages import MODELS_PER_DEVICE_MAX
from controller.devices import Device, is_measured, next_generation
from controller.rollouts.choosing import Choices, choices
from controller.rollouts.judgement import OPEN, RESOLVED, Standing, budget_spent, has_evidence, standing
from controller.rollouts.lifecycle import (
    current_phase,
    judged_phase,
    moved,
    phases_after,
    revised,
    with_queued_canceled,
)
from controller.rollouts.model import (
    TERMINAL_ROLLOUT_STATES,
    Execution,
    ExecutionState,
    OnFailure,
    PhaseState,
    Rollout,
    RolloutState,
)
from controller.rollouts.observation import (
    REASON_SILENT,
    has_gone_silent,
    is_reachable,
    is_straggler,
    observed,
    version_to_give_back,
)
from controller.rollouts.patching import (
    Lineage,
    PatchKey,
    target_variant,
    undecided,
    unrequested,
    wanted_patches,
)
from controller.rollouts.transitions import ExecutionEvent, PhaseEvent, RolloutEvent
from controller.variants import Findings

ORDERS_PER_PLAN_MAX = 200
"""Orders made by one plan: each is signed inside the transaction that stores it, and that must be quick."""

WAITING = frozenset({ExecutionState.NOTIFIED, ExecutionState.IN_PROGRESS})
"""Told, and not serving the release yet."""
STOP_EVENTS = {
    OnFailure.ROLLBACK: RolloutEvent.ROLLBACK,
    OnFailure.PAUSE: RolloutEvent.PAUSE,
    OnFailure.ABORT: RolloutEvent.ABORT,
}


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one rollout at one moment. `devices` has at least those that `watched` names.

    `listening_since` is when the controller last began to hear devices, None while it cannot. `improvable` are devices
    that wait for a cheaper way to what they were ordered to run, and for which there is one that their order lacks.
    """

    rollout: Rollout
    executions: tuple[Execution, ...]
    devices: Mapping[DeviceId, Device]
    manifest: ReleaseManifest
    lineage: Lineage = Lineage()
    listening_since: float | None = 0.0
    improvable: frozenset[DeviceId] = frozenset()
    found: Mapping[str, Findings] = {}
    """What devices have found of the release's variants, by their class."""
    elsewhere: tuple[Execution, ...] = ()
    """Executions of other active rollouts of the same release."""


class Notify(msgspec.Struct, frozen=True, kw_only=True):
    """Order the release for a device; `execution` is how its part stands afterwards, `chosen` variant and all."""

    execution: Execution
    version: Version


class Revert(msgspec.Struct, frozen=True, kw_only=True):
    """Order a device back to `version` (None: the model goes out of service), in the variant that it had."""

    execution: Execution
    version: Version | None


class UpdateExecution(msgspec.Struct, frozen=True, kw_only=True):
    """Store how a device's part stands."""

    execution: Execution


class UpdateRollout(msgspec.Struct, frozen=True, kw_only=True):
    """Store how the rollout and its phases stand."""

    rollout: Rollout


class RequestPatch(msgspec.Struct, frozen=True, kw_only=True):
    """Have a patch built."""

    key: PatchKey


class Renew(msgspec.Struct, frozen=True, kw_only=True):
    """Order what a device was ordered once more, with the ways to it that there are now."""

    device: DeviceId


Action = Notify | Revert | UpdateExecution | UpdateRollout | RequestPatch | Renew


def plan(snapshot: Snapshot, now: float) -> list[Action]:
    """The actions that are due at `now` (Unix seconds); empty when there is nothing to do but wait."""
    after = tuple(_with_news(execution, snapshot, now) for execution in snapshot.executions)
    news: list[Action] = [
        UpdateExecution(execution=new) for old, new in zip(snapshot.executions, after, strict=True) if new is not old
    ]
    step = _STEPS.get(snapshot.rollout.state)
    steps = step(replace(snapshot, executions=after), now) if step else []
    return news + (steps or _renewals(snapshot))


def watched(rollout: Rollout, executions: Iterable[Execution]) -> list[DeviceId]:
    """The devices that a snapshot of this rollout must hold: those whose news could still change something."""
    if rollout.state in TERMINAL_ROLLOUT_STATES:
        return [execution.device for execution in executions if execution.state in OPEN]
    if rollout.state in {RolloutState.PREPARING, RolloutState.ROLLING_BACK}:
        return [execution.device for execution in executions]
    index = current_phase(rollout)
    reach = len(rollout.phases) if index is None else index
    return [
        execution.device
        for execution in executions
        if execution.phase == reach or (execution.phase < reach and execution.state not in RESOLVED)
    ]


def _with_news(execution: Execution, snapshot: Snapshot, now: float) -> Execution:
    device = snapshot.devices.get(execution.device)
    if device is None:
        return execution
    rollout = snapshot.rollout
    execution = observed(execution, device, rollout.spec.release, now)
    if not _is_watched_for_silence(execution, rollout):
        return execution
    if not has_gone_silent(execution, device, rollout.spec.silence_s, snapshot.listening_since, now):
        return execution
    detail = f"not heard from for {rollout.spec.silence_s:g} s after it began to serve the release"
    return moved(execution, ExecutionEvent.WENT_SILENT, now, reason=REASON_SILENT, detail=detail)


def _is_watched_for_silence(execution: Execution, rollout: Rollout) -> bool:
    if rollout.state is RolloutState.ROLLING_BACK:
        return False
    phase = rollout.phases[execution.phase]
    baking = phase.state in {PhaseState.DEPLOYING, PhaseState.BAKING}
    return execution.state is ExecutionState.PROBATION or (execution.state is ExecutionState.SUCCEEDED and baking)


def _preparing(snapshot: Snapshot, now: float) -> list[Action]:
    first = [execution for execution in snapshot.executions if execution.phase == 0]
    chosen = _choices(snapshot, first, now)
    requests = _patch_requests(snapshot, snapshot.executions, chosen)
    if requests or any(undecided(_wanted(snapshot, execution, chosen), snapshot.lineage) for execution in first):
        return requests
    return [UpdateRollout(rollout=revised(snapshot.rollout, now, RolloutEvent.PREPARED, reason=""))]


def _awaiting_approval(snapshot: Snapshot, now: float) -> list[Action]:
    return _stop_if_budget_spent(snapshot, now)


def _paused(snapshot: Snapshot, now: float) -> list[Action]:
    # Nobody is told anything while paused, but devices that were told before can still fail.
    return _stop_if_budget_spent(snapshot, now)


def _running(snapshot: Snapshot, now: float) -> list[Action]:
    stop = _stop_if_budget_spent(snapshot, now)
    if stop:
        return stop
    index = current_phase(snapshot.rollout)
    if index is None:
        return _finish(snapshot, now)
    return _PHASE_STEPS[snapshot.rollout.phases[index].state](snapshot, index, now)


def _rolling_back(snapshot: Snapshot, now: float) -> list[Action]:
    reverts = [
        _revert(snapshot, execution, now) for execution in snapshot.executions if _must_go_back(snapshot, execution)
    ]
    if reverts:
        return reverts[:ORDERS_PER_PLAN_MAX]
    going = [one for one in snapshot.executions if one.state is ExecutionState.REVERTING]
    reachable = [
        one
        for one in going
        if one.device in snapshot.devices and is_reachable(snapshot.devices[one.device], snapshot.listening_since, now)
    ]
    if reachable:
        return []
    unheard = f"; {len(going)} unreachable and will go back when they return" if going else ""
    reason = snapshot.rollout.reason + unheard
    return [UpdateRollout(rollout=revised(snapshot.rollout, now, RolloutEvent.TAKEN_BACK, reason=reason))]


_STEPS: dict[RolloutState, Callable[[Snapshot, float], list[Action]]] = {
    RolloutState.PREPARING: _preparing,
    RolloutState.AWAITING_APPROVAL: _awaiting_approval,
    RolloutState.RUNNING: _running,
    RolloutState.PAUSED: _paused,
    RolloutState.ROLLING_BACK: _rolling_back,
}


def _begin(snapshot: Snapshot, index: int, now: float) -> list[Action]:
    rollout = snapshot.rollout
    if rollout.spec.phases[index].approval and not rollout.phases[index].approved:
        reason = f"phase {index + 1} waits for approval"
        return [UpdateRollout(rollout=revised(rollout, now, RolloutEvent.APPROVAL_NEEDED, reason=reason))]
    phases = phases_after(rollout, index, PhaseEvent.STARTED, now)
    return [UpdateRollout(rollout=revised(rollout, now, phases=phases, reason=""))]


def _deploy(snapshot: Snapshot, index: int, now: float) -> list[Action]:
    queued = [one for one in snapshot.executions if one.phase <= index and one.state is ExecutionState.QUEUED]
    chosen = _choices(snapshot, queued, now)
    ready = [one for one in queued if one.device not in chosen or chosen[one.device] is not None]
    due = [one for one in ready if not undecided(_wanted(snapshot, one, chosen), snapshot.lineage)]
    actions = _patch_requests(snapshot, ready, chosen)
    actions += [_tell(snapshot, execution, chosen, now) for execution in due[:ORDERS_PER_PLAN_MAX]]
    if actions:
        return actions
    stands = _standing(snapshot, index, now)
    if stands.waiting:
        return []
    if not has_evidence(stands):
        return _stalled(snapshot, index, stands, now)
    phases = phases_after(snapshot.rollout, index, PhaseEvent.RESOLVED, now)
    return [UpdateRollout(rollout=revised(snapshot.rollout, now, phases=phases, reason=""))]


def _bake(snapshot: Snapshot, index: int, now: float) -> list[Action]:
    rollout = snapshot.rollout
    bake_s = rollout.spec.phases[index].bake_s
    since = rollout.phases[index].baking_since
    if since is None or now - since < (rollout.spec.bake_s if bake_s is None else bake_s):
        return []
    phases = phases_after(rollout, index, PhaseEvent.BAKED, now)
    return [UpdateRollout(rollout=revised(rollout, now, phases=phases))]


def _wait_for_a_person(_snapshot: Snapshot, _index: int, _now: float) -> list[Action]:
    return []


_PHASE_STEPS: dict[PhaseState, Callable[[Snapshot, int, float], list[Action]]] = {
    PhaseState.PENDING: _begin,
    PhaseState.DEPLOYING: _deploy,
    PhaseState.BAKING: _bake,
    PhaseState.FAILED: _wait_for_a_person,
    PhaseState.PASSED: _wait_for_a_person,
}


def _finish(snapshot: Snapshot, now: float) -> list[Action]:
    canceled = with_queued_canceled(snapshot.executions, now, "the rollout ended first")
    rollout = revised(snapshot.rollout, now, RolloutEvent.FINISHED, reason="")
    return [*(UpdateExecution(execution=one) for one in canceled), UpdateRollout(rollout=rollout)]


def _stalled(snapshot: Snapshot, index: int, stands: Standing, now: float) -> list[Action]:
    reason = f"phase {index + 1} goes on when the first of its {stands.stragglers} stragglers answers"
    if stands.stragglers == 0:
        reason = f"no device of phase {index + 1} can take the release"
    if snapshot.rollout.reason == reason:
        return []
    return [UpdateRollout(rollout=revised(snapshot.rollout, now, reason=reason))]


def _stop_if_budget_spent(snapshot: Snapshot, now: float) -> list[Action]:
    rollout = snapshot.rollout
    index = judged_phase(rollout)
    if index is None or rollout.phases[index].state is PhaseState.FAILED:
        return []
    stands = _standing(snapshot, index, now)
    if not budget_spent(rollout.spec.error_budget, stands):
        return []
    reason = _why_stopped(snapshot, index, stands)
    phases = phases_after(rollout, index, PhaseEvent.BUDGET_SPENT, now, reason)
    event = STOP_EVENTS[rollout.spec.on_failure]
    stopped = revised(rollout, now, event, phases=phases, reason=reason)
    ends = event is not RolloutEvent.PAUSE
    canceled = with_queued_canceled(snapshot.executions, now, "the rollout stopped first") if ends else []
    return [*(UpdateExecution(execution=one) for one in canceled), UpdateRollout(rollout=stopped)]


def _why_stopped(snapshot: Snapshot, index: int, stands: Standing) -> str:
    failed = [one for one in snapshot.executions if one.state is ExecutionState.FAILED and one.phase <= index]
    latest = max(failed, key=lambda one: one.finished_at or 0.0)
    cause = ": ".join(filter(None, (latest.reason, latest.detail)))
    return f"{stands.failed} of {stands.resolved} failed in phase {index + 1}; {latest.device}: {cause}"


def _standing(snapshot: Snapshot, index: int, now: float) -> Standing:
    rollout = snapshot.rollout
    patience_s = rollout.spec.patience_s
    return standing(rollout.phases[index], snapshot.executions, patience_s, snapshot.listening_since, now)


def _choices(snapshot: Snapshot, queued: Iterable[Execution], now: float) -> Choices:
    spec, since = snapshot.rollout.spec, snapshot.listening_since
    return choices(
        queued,
        [*snapshot.executions, *snapshot.elsewhere],
        snapshot.devices,
        snapshot.manifest,
        snapshot.found,
        is_reachable=lambda device: is_reachable(device, since, now),
        is_late=lambda execution: is_straggler(execution, spec.patience_s, since, now),
    )


def _wanted(snapshot: Snapshot, execution: Execution, chosen: Choices) -> tuple[PatchKey, ...]:
    """The patches for a device; for one that is measured only when it is known what it gets."""
    device = snapshot.devices.get(execution.device)
    if device is None:
        return ()
    queued = execution.state is ExecutionState.QUEUED
    choice = chosen.get(execution.device) if queued else execution.chosen
    if choice is None and queued and is_measured(device, frozenset(snapshot.manifest.variants)):
        return ()
    return wanted_patches(device, snapshot.manifest, snapshot.lineage, choice.variant if choice else None)


def _patch_requests(snapshot: Snapshot, executions: Iterable[Execution], chosen: Choices) -> list[Action]:
    missing = {key for one in executions for key in unrequested(_wanted(snapshot, one, chosen), snapshot.lineage)}
    return [RequestPatch(key=key) for key in sorted(missing)]


def _tell(snapshot: Snapshot, execution: Execution, chosen: Choices, now: float) -> Action:
    """Order the release for a queued device, or cancel its part when it could never run it."""
    spec = snapshot.rollout.spec
    device = snapshot.devices.get(execution.device)
    obstacle = _obstacle(snapshot, device)
    if device is None or obstacle:
        return UpdateExecution(execution=moved(execution, ExecutionEvent.CANCELED, now, reason=obstacle))
    # An execution that had an order before (a retry, or taken over from an older rollout) knows what to give back.
    previous, before = execution.previous, execution.previous_chosen
    if not execution.generation:
        previous, before = version_to_give_back(device, spec.release), device.chosen.get(spec.release.model)
    told = moved(
        execution,
        ExecutionEvent.ORDERED,
        now,
        generation=next_generation(device),
        previous=previous,
        notified_at=now,
        chosen=chosen.get(device.id),
        previous_chosen=before if before and before.version == previous else None,
    )
    return Notify(execution=told, version=spec.release.version)


def _renewals(snapshot: Snapshot) -> list[Action]:
    """What can be done for devices that keep to a byte budget: have patches built, and tell of those that were."""
    if snapshot.rollout.spec.max_bytes is None:
        return []
    requests = _patch_requests(snapshot, (one for one in snapshot.executions if one.state in WAITING), {})
    return requests + [Renew(device=device) for device in sorted(snapshot.improvable)[:ORDERS_PER_PLAN_MAX]]


def _obstacle(snapshot: Snapshot, device: Device | None) -> str:
    if device is None:
        return "the device is not in the fleet any more"
    if target_variant(device, snapshot.manifest) is None:
        return "no variant of the release fits the device"
    if len(device.assigned) >= MODELS_PER_DEVICE_MAX and snapshot.manifest.model not in device.assigned:
        return f"the device already runs {MODELS_PER_DEVICE_MAX} models"
    return ""


def _must_go_back(snapshot: Snapshot, execution: Execution) -> bool:
    told = execution.notified_at is not None and execution.state in RESOLVED | {
        ExecutionState.NOTIFIED,
        ExecutionState.IN_PROGRESS,
        ExecutionState.PROBATION,
    }
    device = snapshot.devices.get(execution.device)
    release = snapshot.rollout.spec.release
    if not told or device is None or (execution.previous == release.version and not _changed_variant(execution)):
        return False
    # A device that was since ordered something else (by this rollback, or by a newer rollout) is left alone.
    return device.assigned.get(release.model) == release.version


def _changed_variant(execution: Execution) -> bool:
    """Whether a device that had the release already got another variant of it."""
    before, after = execution.previous_chosen, execution.chosen
    return before is not None and after is not None and before.variant != after.variant


def _revert(snapshot: Snapshot, execution: Execution, now: float) -> Action:
    device = snapshot.devices[execution.device]
    ordered = moved(execution, ExecutionEvent.REVERT_ORDERED, now, generation=next_generation(device))
    return Revert(execution=ordered, version=execution.previous)
