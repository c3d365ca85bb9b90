"""What a rollout would do, before anybody is told: devices, patches and bytes per phase.

An estimate of the plain case: every device takes the release once, by the cheapest way that there is now from what it
holds. Where no patch is ready and some are not decided yet, the device is counted as taking it whole and listed as
`undecided`, so the real figure can only be smaller.
"""

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from common.artifact.manifest import ArtifactRef, ReleaseManifest
from controller.devices import Device, Presence, presence
from controller.rollouts.membership import draw, select_some
from controller.rollouts.model import PhasePreview, Preview, RolloutSpec
from controller.rollouts.patching import Lineage, target_variant, undecided, wanted_patches
from controller.rollouts.ways import Catalogue, least_bytes, offered


def preview(
    spec: RolloutSpec,
    devices: Iterable[Device],
    *,
    manifest: ReleaseManifest,
    envelope: ArtifactRef,
    lineage: Lineage,
    catalogue: Catalogue,
    salt: str,
    now: float,
) -> Preview:
    """What `spec` would do at `now`; raises as `commands.create` does.

    `envelope` is the signed manifest, `catalogue` what can be offered now.
    """
    matched = select_some(spec.selector, devices, now)
    placed = draw(salt, matched, spec.phases, now)
    costs: dict[object, PhasePreview] = {}
    phases: list[list[PhasePreview]] = [[] for _ in spec.phases]
    for device in matched:
        key = (device.reported and frozenset(device.reported.held), device.capabilities)
        if key not in costs:  # most devices of a fleet are alike
            costs[key] = _one(device, spec, manifest=manifest, envelope=envelope, lineage=lineage, catalogue=catalogue)
        online = int(presence(device, now) is Presence.ONLINE)
        phases[placed[device.id]].append(replace(costs[key], online=online))
    summed = tuple(_phase(index, members) for index, members in enumerate(phases))
    return Preview(
        devices=sum(phase.devices for phase in summed),
        online=sum(phase.online for phase in summed),
        bytes=sum(phase.bytes for phase in summed),
        full_bytes=sum(phase.full_bytes for phase in summed),
        phases=summed,
    )


def _phase(index: int, members: Sequence[PhasePreview]) -> PhasePreview:
    counted = [name for name in PhasePreview.__struct_fields__ if name != "index"]
    return PhasePreview(index=index, **{name: sum(getattr(one, name) for one in members) for name in counted})


def _one(
    device: Device,
    spec: RolloutSpec,
    *,
    manifest: ReleaseManifest,
    envelope: ArtifactRef,
    lineage: Lineage,
    catalogue: Catalogue,
) -> PhasePreview:
    """What the release costs one device, as a phase of one."""
    alone = PhasePreview(index=0, devices=1)
    variant = target_variant(device, manifest)
    if variant is None:
        return replace(alone, unfit=1)
    held = frozenset(device.reported.held if device.reported else ())
    codecs = device.capabilities.patch_codecs if device.capabilities else ()
    files = [offered(name, file, held, codecs, catalogue) for name, file in variant.files.items()]
    needed = sum(least_bytes(file, held) for file in files)
    over = spec.max_bytes is not None and envelope.size + needed > spec.max_bytes
    counted = replace(alone, bytes=needed, full_bytes=variant.size, over_budget=int(over))
    if all(file.digest in held for file in variant.files.values()):
        return replace(counted, unchanged=1)
    if needed < variant.size:
        return replace(counted, patched=1)
    waits = int(undecided(wanted_patches(device, manifest, lineage), lineage))
    return replace(counted, full=1, undecided=waits)
