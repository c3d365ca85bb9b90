"""What a rollout would do, before anybody is told: devices, patches and bytes per phase.

An estimate of the plain case: every device takes the release once, by the smallest patch that is ready for what it
holds, otherwise whole. Patches that are not decided yet are counted as whole and listed as `undecided`, so the real
figure can only be smaller.
"""

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from common.artifact.manifest import ReleaseManifest
from controller.devices import Device, Presence, presence
from controller.rollouts.membership import draw, select_some
from controller.rollouts.model import PhasePreview, Preview, RolloutSpec
from controller.rollouts.patching import Lineage, PatchKey, target_artifact, undecided, wanted_patches


def preview(
    spec: RolloutSpec,
    devices: Iterable[Device],
    *,
    manifest: ReleaseManifest,
    lineage: Lineage,
    patch_bytes: Mapping[PatchKey, int],
    salt: str,
    now: float,
) -> Preview:
    """What `spec` would do at `now`; raises as `commands.create` does. `patch_bytes` are the sizes of ready patches."""
    matched = select_some(spec.selector, devices, now)
    placed = draw(salt, matched, spec.phases, now)
    costs = {device.id: _one(device, manifest, lineage, patch_bytes, now) for device in matched}
    phases = tuple(
        _phase(index, [cost for device, cost in costs.items() if placed[device] == index])
        for index in range(len(spec.phases))
    )
    return Preview(
        devices=sum(phase.devices for phase in phases),
        online=sum(phase.online for phase in phases),
        bytes=sum(phase.bytes for phase in phases),
        full_bytes=sum(phase.full_bytes for phase in phases),
        phases=phases,
    )


def _phase(index: int, members: Sequence[PhasePreview]) -> PhasePreview:
    counted = [name for name in PhasePreview.__struct_fields__ if name != "index"]
    return PhasePreview(index=index, **{name: sum(getattr(one, name) for one in members) for name in counted})


def _one(
    device: Device, manifest: ReleaseManifest, lineage: Lineage, patch_bytes: Mapping[PatchKey, int], now: float
) -> PhasePreview:
    """What the release costs one device, as a phase of one."""
    alone = PhasePreview(index=0, devices=1, online=int(presence(device, now) is Presence.ONLINE))
    target = target_artifact(device, manifest)
    if target is None:
        return replace(alone, unfit=1)
    if device.reported is not None and target.digest in device.reported.held:
        return replace(alone, unchanged=1, full_bytes=target.size)
    wanted = wanted_patches(device, manifest, lineage)
    ready = [patch_bytes[key] for key in wanted if key in patch_bytes]
    if ready:
        return replace(alone, patched=1, bytes=min(ready), full_bytes=target.size)
    waits = int(undecided(wanted, lineage))
    return replace(alone, full=1, undecided=waits, bytes=target.size, full_bytes=target.size)
