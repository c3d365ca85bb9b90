"""What the controller knows of a device: pure values and the questions one may ask of them.

A device has two sides (a twin): what it was last told to run (`assigned`, ordered by `generation`) and what it last
said of itself (`reported`, `heartbeat`, `connection`). Nothing here knows how these are stored or sent.

Presence is a function of `now`: a device is online while its connection's birth has not been followed by a death and
it was heard from within `presence_timeout_s`; MQTT alone would call a half-open connection online.
"""

from enum import StrEnum
from typing import Any

import msgspec

from common.artifact.manifest import DEFAULT_VARIANT, MEASURED_VARIANT
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.wire import Capabilities, Heartbeat, ReportedModel, ReportedState
from controller.variants import Chosen

PRESENCE_TIMEOUT_S = 45.0
"""Three missed heartbeats of the default interval (15 s)."""


class Presence(StrEnum):
    """Whether a device can be reached."""

    ONLINE = "online"
    OFFLINE = "offline"
    NEVER_SEEN = "never_seen"


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One machine with an agent.

    `epoch` and `connected` come from birth and will; `assigned` is what the controller wants, `generation` the number
    of the newest order made for the device. `chosen` are the variants that were chosen by measurement, and why.
    `revision` grows with every change that an operator can make (the ETag).
    """

    id: DeviceId
    created_at: float
    labels: dict[str, str] = {}
    capabilities: Capabilities | None = None
    connected: bool = False
    epoch: int = 0
    last_seen: float | None = None
    heartbeat: Heartbeat | None = None
    reported: ReportedState | None = None
    assigned: dict[ModelName, Version] = {}
    chosen: dict[ModelName, Chosen] = {}
    generation: int = 0
    revision: int = 1


def presence(device: Device, now: float, timeout_s: float = PRESENCE_TIMEOUT_S) -> Presence:
    """Whether the device can be reached at `now` (Unix seconds)."""
    if device.last_seen is None:
        return Presence.NEVER_SEEN
    fresh = now - device.last_seen <= timeout_s
    return Presence.ONLINE if device.connected and fresh else Presence.OFFLINE


def reported_model(device: Device, model: ModelName) -> ReportedModel | None:
    """What the device says of one model, if it said anything."""
    if device.reported is None:
        return None
    return next((entry for entry in device.reported.models if entry.model == model), None)


def running_version(device: Device, model: ModelName) -> Version | None:
    """The version that answers requests on the device, as far as we were told."""
    entry = reported_model(device, model)
    return entry.running if entry else None


def next_generation(device: Device) -> int:
    """The number of the next order for the device: newer than ours, and than any it says it has accepted.

    The two differ after a restore from a backup: the device has seen orders that the controller has forgotten, and
    refuses lower numbers.
    """
    accepted = device.reported.generation if device.reported else 0
    return max(device.generation, accepted) + 1


def in_sync(device: Device) -> bool:
    """Whether the device says it runs exactly what it was told to run."""
    told = {ReleaseRef(model, version) for model, version in device.assigned.items()}
    models = device.reported.models if device.reported else ()
    runs = {ReleaseRef(entry.model, entry.running) for entry in models if entry.running is not None}
    return told == runs


def choose_variant(device: Device, available: frozenset[str]) -> str | None:
    """The build of a release for this device: the first it prefers that exists, else `default`, else None.

    A device that leaves it to measurement (see `is_measured`) takes any: this is what it gets where nobody chooses.
    """
    preferred = _preferred(device)
    usual = next((name for name in (*preferred, DEFAULT_VARIANT) if name in available), None)
    return min(available) if usual is None and MEASURED_VARIANT in preferred else usual


def is_measured(device: Device, available: frozenset[str]) -> bool:
    """Whether measurement decides which of `available` the device gets: its owner says `auto`, none of what the owner
    prefers to that is there, and there is a choice. A device that has not said of which class it is cannot take part.
    """
    asked = next((name for name in _preferred(device) if name in available or name == MEASURED_VARIANT), None)
    return asked == MEASURED_VARIANT and len(available) > 1 and bool(class_of(device))


def class_of(device: Device) -> str:
    """How the device is built, in its own words; empty if it has not said."""
    return (device.capabilities.device_class or "") if device.capabilities else ""


def _preferred(device: Device) -> tuple[str, ...]:
    return device.capabilities.variants if device.capabilities else ()


FACT_NAMES = frozenset(
    {"id", "labels", "presence", "running", "machine", "agent_version", "cpu_count", "memory_mb", "disk_free_mb"}
)
"""The keys of `facts`, for compiling a selector before there is a device."""


def facts(device: Device, now: float) -> dict[str, Any]:
    """What a selector may speak of; the names are part of the API (docs/reference/selectors.md)."""
    capabilities = device.capabilities
    heartbeat = device.heartbeat
    return {
        "id": device.id,
        "labels": device.labels,
        "presence": presence(device, now).value,
        "running": {entry.model: entry.running or "" for entry in (device.reported.models if device.reported else ())},
        "machine": capabilities.machine if capabilities else "",
        "agent_version": capabilities.agent_version if capabilities else "",
        "cpu_count": capabilities.cpu_count if capabilities else 0,
        "memory_mb": capabilities.memory_bytes // 2**20 if capabilities else 0,
        "disk_free_mb": heartbeat.disk_free_bytes // 2**20 if heartbeat else 0,
    }
