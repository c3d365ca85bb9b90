"""What the stored telemetry of a release says: one question a function, within a unit of work.

Only a reference that the release itself carries counts: what a device sketched by another one says nothing about it.
"""

from collections.abc import Sequence

from common.ids import DeviceId
from common.monitoring.drift import Drift, drift_of
from controller.store.port import Release, Transaction


def drift_in(
    tx: Transaction, release: Release, since: float, devices: Sequence[DeviceId] | None = None
) -> tuple[Drift, ...]:
    """The judgement by each reference that devices have counted by since then, on all devices or on these."""
    sketches = tx.telemetry.sketches(release.ref, since, devices)
    references = {
        variant.files[variant.reference].digest
        for variant in release.manifest.variants.values()
        if variant.reference is not None
    }
    known = ((sketches[digest], tx.telemetry.reference(digest)) for digest in sorted(references & sketches.keys()))
    return tuple(drift_of(reference, sketch) for sketch, reference in known if reference is not None)
