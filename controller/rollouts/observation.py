"""What a device's own words, or its silence, mean for its part in a rollout.

Level-triggered: the device's newest report says how things are, so it does not matter how many reports were lost or
repeated before it. A statement counts only if the device had accepted an order at least as new as the execution's
(`generation`) and speaks of the release in question; whatever it said about earlier orders is history.

Silence is judged only while the controller itself can hear (`listening_since`): after a restart, or while the broker
is away, every device looks silent, and that is nobody's fault.
"""

from msgspec.structs import replace

from common.ids import ReleaseRef, Version
from common.wire import ReportedModel, UpdateReport
from controller.devices import PRESENCE_TIMEOUT_S, Device, reported_model
from controller.rollouts.findings import shadow_in_words
from controller.rollouts.lifecycle import moved
from controller.rollouts.model import Execution, ExecutionState
from controller.rollouts.transitions import ExecutionEvent

BUSY_PHASES = frozenset({"fetching", "verifying", "warming", "shadowing", "replacing", "probation"})
REASON_SILENT = "silent"


def observed(execution: Execution, device: Device, release: ReleaseRef, now: float) -> Execution:
    """The execution after what the device says of itself."""
    entry = reported_model(device, release.model)
    if execution.state is ExecutionState.REVERTING:
        return _going_back(execution, device, entry, now)
    if entry is None or execution.state is ExecutionState.QUEUED:
        return execution
    update = _matching(entry.last_update, execution.generation, release.version)
    if update is not None and update.outcome != "succeeded":
        reason = update.reason or update.outcome
        return moved(execution, ExecutionEvent.GAVE_UP, now, reason=reason, detail=update.detail)
    # The same version may be ordered again in another variant: what runs while that order waits is the old one.
    accepted = entry.generation if execution.chosen else _accepted(device, entry)
    event = _progress(entry, accepted, execution.generation, release.version, update)
    if event is None:
        return execution
    if event is ExecutionEvent.WORKING:
        return _waiting_for(moved(execution, event, now), entry)
    return moved(execution, event, now, detail=_found(entry, update))


def has_gone_silent(
    execution: Execution, device: Device, silence_s: float, listening_since: float | None, now: float
) -> bool:
    """Whether an activated device has not been heard from for longer than `silence_s`, while we listened."""
    if listening_since is None or execution.activated_at is None:
        return False
    return now - max(device.last_seen or 0.0, execution.activated_at, listening_since) > silence_s


def is_straggler(execution: Execution, straggler_s: float, listening_since: float | None, now: float) -> bool:
    """Whether a device that was told has had its time to activate, and has not."""
    waiting = execution.state in {ExecutionState.NOTIFIED, ExecutionState.IN_PROGRESS}
    if not waiting or execution.notified_at is None or listening_since is None:
        return False
    return now - max(execution.notified_at, listening_since) > straggler_s


def is_reachable(device: Device, listening_since: float | None, now: float) -> bool:
    """Whether an order can be expected to be obeyed soon; unlike `presence`, it gives everyone time after a restart."""
    if not device.connected or device.last_seen is None:
        return False
    return listening_since is None or now - max(device.last_seen, listening_since) <= PRESENCE_TIMEOUT_S


def version_to_give_back(device: Device, release: ReleaseRef) -> Version | None:
    """What the device should run again if `release` is taken back from it.

    That is what it was assigned; but if it has put that version aside itself, then the one it runs instead.
    """
    assigned = device.assigned.get(release.model)
    entry = reported_model(device, release.model)
    if entry is None or entry.last_update is None:
        return assigned
    put_aside = entry.last_update.version == assigned and entry.last_update.outcome != "succeeded"
    return entry.running if put_aside else assigned


def _progress(
    entry: ReportedModel, accepted: int, generation: int, version: Version, update: UpdateReport | None
) -> ExecutionEvent | None:
    if accepted < generation:
        return None
    if update is not None or (entry.running == version and entry.phase == "idle"):
        return ExecutionEvent.COMMITTED
    if entry.running == version and entry.phase == "probation":
        return ExecutionEvent.ACTIVATED
    if entry.target == version and entry.phase in BUSY_PHASES:
        return ExecutionEvent.WORKING
    return None


def _found(entry: ReportedModel, update: UpdateReport | None) -> str:
    """What the device found before the switch, if it looked."""
    found = update.shadow if update else entry.shadow
    return shadow_in_words(found) if found else ""


def _waiting_for(execution: Execution, entry: ReportedModel) -> Execution:
    """The execution with what the device says it waits for, while it has not activated the release."""
    if execution.state is not ExecutionState.IN_PROGRESS or execution.detail == entry.detail:
        return execution
    return replace(execution, detail=entry.detail)


def _going_back(execution: Execution, device: Device, entry: ReportedModel | None, now: float) -> Execution:
    if device.reported is None or _accepted(device, entry) < execution.generation:
        return execution
    running = entry.running if entry else None
    update = _matching(entry.last_update, execution.generation, execution.previous) if entry else None
    if update is not None and update.outcome != "succeeded":
        detail = f"could not go back to {execution.previous}: {update.detail or update.reason or update.outcome}"
        return moved(execution, ExecutionEvent.REVERT_FAILED, now, detail=detail)
    if running == execution.previous and not (entry and entry.phase in BUSY_PHASES):
        return moved(execution, ExecutionEvent.REVERTED, now)
    return execution


def _matching(update: UpdateReport | None, generation: int, version: Version | None) -> UpdateReport | None:
    if update is None or update.version != version or update.generation < generation:
        return None
    return update


def _accepted(device: Device, entry: ReportedModel | None) -> int:
    whole = device.reported.generation if device.reported else 0
    return max(whole, entry.generation if entry else 0)
