"""What a rollout would do, before anybody is told: devices, patches and bytes per phase.

An estimate of the plain case: every device takes the release once, by the cheapest way that there is now from what it
holds. Where no patch is ready and some are not decided yet, the device is counted as taking it whole and listed as
`undecided`, so the real figure can only be smaller.
"""

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from common.artifact.manifest import ArtifactRef, ReleaseManifest
from controller.devices import Device, Presence, choose_variant, class_of, is_measured, presence
from controller.rollouts.choosing import variant_before
from controller.rollouts.membership import draw, select_some
from controller.rollouts.model import PhasePreview, Preview, RolloutSpec
from controller.rollouts.patching import Lineage, undecided, wanted_patches
from controller.rollouts.ways import Catalogue, least_bytes, offered
from controller.variants import Findings, settle

NOTHING_FOUND: Mapping[str, Findings] = {}


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
    found: Mapping[str, Findings] = NOTHING_FOUND,
) -> Preview:
    """What `spec` would do at `now`; raises as `commands.create` does.

    `envelope` is the signed manifest, `catalogue` what can be offered now, `found` what classes of devices have found
    of its variants: devices that are measured are counted as if nobody had to try another one.
    """
    matched = select_some(spec.selector, devices, now)
    placed = draw(salt, matched, spec.phases, now)
    costs: dict[object, PhasePreview] = {}
    phases: list[list[PhasePreview]] = [[] for _ in spec.phases]
    for device in matched:
        name = _variant(device, manifest, found)
        key = (device.reported and frozenset(device.reported.held), device.capabilities, name)
        if key not in costs:  # most devices of a fleet are alike
            costs[key] = _one(
                device, name, spec, manifest=manifest, envelope=envelope, lineage=lineage, catalogue=catalogue
            )
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


def _variant(device: Device, manifest: ReleaseManifest, found: Mapping[str, Findings]) -> str | None:
    names = frozenset(manifest.variants)
    if not is_measured(device, names):
        return choose_variant(device, names)
    before = variant_before(device, manifest)
    return settle(found.get(class_of(device), {}), names, device.id, before).variant


def _one(
    device: Device,
    name: str | None,
    spec: RolloutSpec,
    *,
    manifest: ReleaseManifest,
    envelope: ArtifactRef,
    lineage: Lineage,
    catalogue: Catalogue,
) -> PhasePreview:
    """What the release costs one device, as a phase of one."""
    alone = PhasePreview(index=0, devices=1)
    if name is None:
        return replace(alone, unfit=1)
    variant = manifest.variants[name]
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
    waits = int(undecided(wanted_patches(device, manifest, lineage, name), lineage))
    return replace(counted, full=1, undecided=waits)
