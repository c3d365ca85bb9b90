"""Which patches could serve a device, and whether they have been decided.

A patch can serve a device that holds its base (`reported.held`) and speaks its codec. Only files of other releases of
the same model are worth trying as bases. A device is told of a release once each patch that could serve it is decided:
built, found not worth it, or failed. Waiting for a patch that nobody needs would stall a rollout; not waiting for one
that would be ready in a minute costs a full download on a thin link.
"""

from collections.abc import Mapping, Set

import msgspec

from common.artifact.manifest import ArtifactRef, ReleaseManifest
from common.ids import Digest
from controller.devices import Device, choose_variant


class PatchKey(msgspec.Struct, frozen=True, order=True):
    """The name of a patch: what it starts from, what it rebuilds, and how."""

    base: Digest
    target: Digest
    codec: str


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to build patches with: the files of all releases of one model, the codecs that can be made here
    (best first), and what became of the patches that were asked for (True: decided, False: being built).
    """

    artifacts: Set[Digest] = frozenset()
    codecs: tuple[str, ...] = ()
    decided: Mapping[PatchKey, bool] = {}


def target_artifact(device: Device, manifest: ReleaseManifest) -> ArtifactRef | None:
    """The file of the release for this device, or None when no variant fits it."""
    variant = choose_variant(device, frozenset(manifest.variants))
    return None if variant is None else manifest.variants[variant].artifact


def wanted_patches(device: Device, manifest: ReleaseManifest, lineage: Lineage) -> tuple[PatchKey, ...]:
    """The patches that could bring the release to `device`; none when it holds the file, or nothing to start from."""
    target = target_artifact(device, manifest)
    if target is None or device.reported is None or device.capabilities is None:
        return ()
    held = frozenset(device.reported.held)
    spoken = frozenset(device.capabilities.patch_codecs)
    codec = next((name for name in lineage.codecs if name in spoken), None)
    if target.digest in held or codec is None:
        return ()
    return tuple(PatchKey(base, target.digest, codec) for base in sorted(held & lineage.artifacts))


def undecided(wanted: tuple[PatchKey, ...], lineage: Lineage) -> bool:
    """Whether some of these patches may still come."""
    return not all(lineage.decided.get(key, False) for key in wanted)


def unrequested(wanted: tuple[PatchKey, ...], lineage: Lineage) -> tuple[PatchKey, ...]:
    """Those of these patches that nobody has asked for yet."""
    return tuple(key for key in wanted if key not in lineage.decided)
