"""What devices say, written into the store: one function per message, each a part of a unit of work.

Delivery is at least once and unordered across topics, and retained messages come again after every restart. So each
message is placed by its `(epoch, seq)`: an older or repeated one changes nothing (and does not make a device look
alive), and a death belongs to exactly one birth. Every function returns whether anything changed; the caller then
wakes the reconciler.

Raises `InvalidInput` for a message that names another device than its topic (or token) does, or one we do not know.
"""

import msgspec
from msgspec.structs import replace

from common.errors import InvalidInput
from common.ids import DeviceId, ModelName, ReleaseRef
from common.monitoring.reference import is_counted_by
from common.wire import (
    Heartbeat,
    Message,
    Presence,
    ReportedModel,
    ReportedState,
    Telemetry,
    TelemetryWindow,
    UpdateReport,
)
from controller.devices import Device, class_of
from controller.store.port import Event, FoundVariant, Transaction


def apply_presence(tx: Transaction, device_id: DeviceId, message: Presence, now: float) -> bool:
    """Birth or death. A connection is named by its epoch, is born once and dies once."""
    device = _sender(tx, device_id, message)
    never_connected = device.epoch == 0 and device.last_seen is None
    if message.epoch < device.epoch:
        return False
    if message.epoch == device.epoch and message.online and not never_connected:
        return False  # repeated, or overtaken by its own death
    if message.online:
        capabilities = message.capabilities or device.capabilities
        _put_connected(tx, replace(device, capabilities=capabilities), message.epoch, now, born=True)
        return True
    if message.epoch == device.epoch and not device.connected:
        return False
    # A death with a newer epoch: its birth was lost, and it is over already.
    tx.devices.put(replace(device, connected=False, epoch=message.epoch))
    if device.connected:
        _emit(tx, "device.offline", device_id, now, epoch=message.epoch)
    return True


def apply_heartbeat(tx: Transaction, device_id: DeviceId, message: Heartbeat, now: float) -> bool:
    """A sign of life."""
    device = _sender(tx, device_id, message)
    last = device.heartbeat
    if message.epoch < device.epoch or (last is not None and _place(message) <= _place(last)):
        return False
    if message.epoch == device.epoch and not device.connected:
        return False  # sent before the death that we know of
    _put_connected(tx, replace(device, heartbeat=message), message.epoch, now)
    return True


def apply_reported(tx: Transaction, device_id: DeviceId, message: ReportedState, now: float) -> bool:
    """What the device says it runs. It may come over HTTP while MQTT is silent, so it says nothing about the link."""
    device = _sender(tx, device_id, message)
    last = device.reported
    if last is not None and _place(message) <= _place(last):
        return False
    tx.devices.put(replace(device, reported=message, last_seen=now))
    _emit(tx, "device.reported", device_id, now, generation=message.generation, running=_running(message))
    before = {entry.model: entry.last_update for entry in last.models} if last else {}
    for entry in message.models:
        if entry.last_update is not None and not _same(entry.last_update, before.get(entry.model)):
            _emit_finished(tx, device_id, entry, entry.last_update, now)
            _note_finding(tx, device, entry.model, entry.last_update, now)
    return True


def apply_telemetry(tx: Transaction, device_id: DeviceId, message: Telemetry, now: float) -> bool:
    """Finished windows; windows that came before are not counted twice. It does not concern the reconciler."""
    device = _sender(tx, device_id, message)
    windows = [_with_known_sketch(tx, window) for window in message.windows]
    tx.telemetry.add(device_id, windows, message.device_windows or ())
    tx.devices.put(replace(device, last_seen=now))
    return False


def _note_finding(tx: Transaction, device: Device, model: ModelName, update: UpdateReport, now: float) -> None:
    """Keep what the device found of a variant that it was asked to measure, or that it could not take it."""
    release = tx.releases.get(ReleaseRef(model, update.version)) if update.variant else None
    variant = release.manifest.variants.get(update.variant or "") if release else None
    if release is None or variant is None or not class_of(device):
        return
    failed = update.outcome != "succeeded"
    found = FoundVariant(
        artifact=variant.artifact.digest,
        device_class=class_of(device),
        device=device.id,
        release=release.ref,
        at=now,
        run_s=None if failed else update.run_s or None,
        failed=failed,
    )
    tx.findings.put(found)


def _with_known_sketch(tx: Transaction, window: TelemetryWindow) -> TelemetryWindow:
    """The window without a sketch that was counted by no reference of ours: nothing could be told from it."""
    if window.sketch is None:
        return window
    reference = tx.telemetry.reference(window.sketch.reference)
    known = reference is not None and is_counted_by(reference, window.sketch)
    return window if known else replace(window, sketch=None)


def _sender(tx: Transaction, device_id: DeviceId, message: Message) -> Device:
    if message.device != device_id:
        raise InvalidInput(f"{device_id} sent a message of {message.device[:80]!r}", field="device")
    device = tx.devices.get(device_id)
    if device is None:
        raise InvalidInput(f"unknown device {device_id}", field="device", fix="let it join the fleet first")
    return device


def _place(message: Heartbeat | ReportedState) -> tuple[int, int]:
    return message.epoch, message.seq


def _put_connected(tx: Transaction, device: Device, epoch: int, now: float, *, born: bool = False) -> None:
    tx.devices.put(replace(device, connected=True, epoch=epoch, last_seen=now))
    if born or not device.connected:
        _emit(tx, "device.online", device.id, now, epoch=epoch)


def _running(message: ReportedState) -> dict[str, str | None]:
    return {entry.model: entry.running for entry in message.models}


def _same(update: UpdateReport, before: UpdateReport | None) -> bool:
    return before is not None and (update.generation, update.version, update.outcome, update.finished_at) == (
        before.generation,
        before.version,
        before.outcome,
        before.finished_at,
    )


def _emit_finished(
    tx: Transaction, device_id: DeviceId, entry: ReportedModel, update: UpdateReport, now: float
) -> None:
    whole: dict[str, object] = msgspec.to_builtins(update)
    _emit(tx, "update.finished", device_id, now, release=f"{entry.model}@{update.version}", **whole)


def _emit(tx: Transaction, kind: str, device_id: DeviceId, now: float, **data: object) -> None:
    tx.journal.append_event(Event(kind=kind, subject=device_id, at=now, data=data))
