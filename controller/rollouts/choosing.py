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
from controller.variants import Chosen, Decision, Findings, decide

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
    kinds: dict[str, _Kind] = {}

    def kind_of(name: str) -> _Kind:
        return kinds.setdefault(name, _Kind(found.get(name, {}), names))

    for one in told:
        if one.state in IN_FLIGHT and one.chosen and one.chosen.exploring:
            kind_of(one.chosen.device_class).tries(one.chosen.variant, one.device, awaited=not is_late(one))
    asking = [devices[one.device] for one in queued if one.device in devices]
    measured = [device for device in asking if is_measured(device, names)]
    made: dict[DeviceId, Chosen | None] = {}
    for device in sorted(measured, key=lambda one: (not is_reachable(one), one.id)):
        name = class_of(device)
        decision = kind_of(name).decide(device.id, variant_before(device, manifest))
        made[device.id] = decision and Chosen(version=manifest.version, device_class=name, **decision._asdict())
    return made


def variant_before(device: Device, manifest: ReleaseManifest) -> str | None:
    """The variant of this release that was chosen for the device last, if one was."""
    chosen = device.chosen.get(manifest.model)
    return chosen.variant if chosen and chosen.version == manifest.version else None


class _Kind:
    """A class of devices while they are decided about, one after the other."""

    def __init__(self, found: Findings, names: frozenset[str]) -> None:
        self._found = found
        self._names = names
        self._heard = {one.device for findings in found.values() for one in findings}
        self._trying: dict[str, set[DeviceId]] = {}
        self._awaited = False
        self._alike: dict[str | None, Decision | None] = {}

    def tries(self, variant: str, device: DeviceId, *, awaited: bool) -> None:
        """Somebody was told, or is about to be, to try a variant."""
        self._trying.setdefault(variant, set()).add(device)
        self._awaited = self._awaited or awaited

    def decide(self, device: DeviceId, before: str | None) -> Decision | None:
        """See `controller.variants.decide`.

        Once there is nothing to try for a device that nothing was heard of, there is nothing for the next one either:
        in a fleet of thousands it is decided about all of these once.
        """
        if device not in self._heard and before in self._alike:
            return self._alike[before]
        decision = decide(self._found, self._names, device, trying=self._trying, awaited=self._awaited, before=before)
        if decision and decision.exploring:
            self.tries(decision.variant, device, awaited=True)
        elif device not in self._heard:
            self._alike[before] = decision
        return decision
