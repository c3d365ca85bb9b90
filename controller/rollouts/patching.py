"""Which patches could serve a device, and whether they have been decided.

A patch can serve a device that holds its base (`reported.held`) and speaks its codec. Only files of other builds of the
same model are worth trying as bases, and of a build with several files only the one that plays the same part: a file
of the same name, else the ONNX file for the ONNX file, else the data file in the same place of the order of names; the
samples of a self-test play a part of their own. A device is told of a release once each patch that could serve it is
decided: built, found not worth it, failed, or skipped for a budget. Waiting for a patch that nobody needs would stall a
rollout; not waiting for one that would be ready in a minute costs a full download on a thin link.
"""

from collections.abc import Iterable, Mapping, Set

import msgspec

from common.artifact.manifest import ReleaseManifest, Variant
from common.ids import Digest
from controller.devices import Device, choose_variant, is_measured


class PatchKey(msgspec.Struct, frozen=True, order=True):
    """The name of a patch: what it starts from, what it rebuilds, and how."""

    base: Digest
    target: Digest
    codec: str


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to build patches with: for each file of a release the files it may be rebuilt from, the codecs that
    can be made here (best first), and what became of the patches that were asked for (True: decided, False: being
    built).
    """

    bases: Mapping[Digest, Set[Digest]] = {}
    codecs: tuple[str, ...] = ()
    decided: Mapping[PatchKey, bool] = {}


def bases_of(manifest: ReleaseManifest, builds: Iterable[Variant]) -> dict[Digest, set[Digest]]:
    """For each file of the release, the files of `builds` (all builds of its model) that play the same part."""
    bases: dict[Digest, set[Digest]] = {
        file.digest: set() for variant in manifest.variants.values() for file in variant.files.values()
    }
    for build in builds:
        for variant in manifest.variants.values():
            for target, base in counterparts(variant, build).items():
                bases[variant.files[target].digest].add(build.files[base].digest)
    return {target: found - {target} for target, found in bases.items()}


def counterparts(variant: Variant, other: Variant) -> dict[str, str]:
    """The names of the files of `variant`, each with that of the file of `other` that plays the same part, if any."""
    pairs = {variant.model: other.model}
    if variant.self_test and other.self_test:  # from release to release most of the inputs are the same
        pairs[variant.self_test.samples] = other.self_test.samples
    if variant.reference and other.reference:
        pairs[variant.reference] = other.reference
    data, others = variant.data_files, other.data_files
    pairs.update({name: name for name in data if name in others})
    left, left_over = ([name for name in names if name not in pairs] for names in (data, others))
    return pairs | dict(zip(left, left_over, strict=False))


def target_variant(device: Device, manifest: ReleaseManifest) -> Variant | None:
    """The build of the release for this device, or None when no variant fits it."""
    name = choose_variant(device, frozenset(manifest.variants))
    return None if name is None else manifest.variants[name]


def wanted_patches(
    device: Device, manifest: ReleaseManifest, lineage: Lineage, variant: str | None = None
) -> tuple[PatchKey, ...]:
    """The patches that could bring the release to `device`; none for files it holds, or with nothing to start from.

    `variant` is the one that was chosen for the device; without it, all that it may get.
    """
    builds = [manifest.variants[variant]] if variant else _possible(device, manifest)
    if device.reported is None or device.capabilities is None:
        return ()
    held = frozenset(device.reported.held)
    spoken = frozenset(device.capabilities.patch_codecs)
    codec = next((name for name in lineage.codecs if name in spoken), None)
    if codec is None:
        return ()
    missing = {file.digest for build in builds for file in build.files.values()} - held
    return tuple(
        PatchKey(base, target, codec)
        for target in sorted(missing)
        for base in sorted(held & lineage.bases.get(target, frozenset()))
    )


def _possible(device: Device, manifest: ReleaseManifest) -> list[Variant]:
    if is_measured(device, frozenset(manifest.variants)):
        return list(manifest.variants.values())
    variant = target_variant(device, manifest)
    return [] if variant is None else [variant]


def undecided(wanted: tuple[PatchKey, ...], lineage: Lineage) -> bool:
    """Whether some of these patches may still come."""
    return not all(lineage.decided.get(key, False) for key in wanted)


def unrequested(wanted: tuple[PatchKey, ...], lineage: Lineage) -> tuple[PatchKey, ...]:
    """Those of these patches that nobody has asked for yet."""
    return tuple(key for key in wanted if key not in lineage.decided)
