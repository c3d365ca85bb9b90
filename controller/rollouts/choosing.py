"""Which variants the queued devices of a rollout get that leave it to measurement, all of them at once.

`controller.variants` decides for one device; here is who decides first, and who counts as trying. Devices that can be
reached come first, then by id, so the same snapshot gives the same choices. A device that was told to try a variant is
trying until the end of its update; once it has had its time to activate it is a straggler, and not waited for. Devices
that are only about to be told count too: those of one batch try different variants.
"""

from collections.abc import Callable, Iterable, Mapping

from common.artifact.manifest import ReleaseManifest
from common.ids import DeviceId
from controller.devices import Device, class_of, is_measured
from controller.rollouts.judgement import IN_FLIGHT
from controller.rollouts.model import Execution
from controller.variants import Chosen, Findings, decide

Choices = Mapping[DeviceId, Chosen | None]
"""What measured devices get; None: they wait for what others find. Devices that choose themselves are not in it."""


def choices(
    queued: Iterable[Execution],
    told: Iterable[Execution],
    devices: Mapping[DeviceId, Device],
    manifest: ReleaseManifest,
    found: Mapping[str, Findings],
    *,
    is_reachable: Callable[[Device], bool],
    is_late: Callable[[Execution], bool],
) -> Choices:
    """The variants for those of the `queued` that are measured, after what their classes have `found`.

    `told` are executions of the same release, of other rollouts as well.
    """
    names = frozenset(manifest.variants)
    asking = [devices[one.device] for one in queued if one.device in devices]
    measured = [device for device in asking if is_measured(device, names)]
    trying, awaited = _trying([one for one in told if one.state in IN_FLIGHT], is_late)
    made: dict[DeviceId, Chosen | None] = {}
    for device in sorted(measured, key=lambda one: (not is_reachable(one), one.id)):
        kind = class_of(device)
        own = trying.setdefault(kind, {})
        before = variant_before(device, manifest)
        decision = decide(found.get(kind, {}), names, device.id, trying=own, awaited=kind in awaited, before=before)
        if decision is None:
            made[device.id] = None
            continue
        made[device.id] = Chosen(version=manifest.version, device_class=kind, **decision._asdict())
        if decision.exploring:
            own.setdefault(decision.variant, set()).add(device.id)
            awaited.add(kind)
    return made


def variant_before(device: Device, manifest: ReleaseManifest) -> str | None:
    """The variant of this release that was chosen for the device last, if one was."""
    chosen = device.chosen.get(manifest.model)
    return chosen.variant if chosen and chosen.version == manifest.version else None


def _trying(
    told: Iterable[Execution], is_late: Callable[[Execution], bool]
) -> tuple[dict[str, dict[str, set[DeviceId]]], set[str]]:
    """Who tries what, by class and variant, and the classes in which some of them are waited for."""
    trying: dict[str, dict[str, set[DeviceId]]] = {}
    awaited: set[str] = set()
    for one in told:
        if one.chosen and one.chosen.exploring:
            kind = one.chosen.device_class
            trying.setdefault(kind, {}).setdefault(one.chosen.variant, set()).add(one.device)
            if not is_late(one):
                awaited.add(kind)
    return trying, awaited
