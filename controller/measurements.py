"""What the store knows of how a release does on devices: one question a function, within a unit of work.

Only a reference that the release itself carries counts: what a device sketched by another one says nothing about it.
"""

import math
from collections.abc import Collection, Sequence

from common.artifact.manifest import ReleaseManifest
from common.ids import DeviceId
from common.monitoring.drift import Drift, drift_of
from controller.resources import VariantView
from controller.store.port import Release, Transaction
from controller.variants import Finding, Findings, median_run_s


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


def findings_in(
    tx: Transaction, manifest: ReleaseManifest, classes: Collection[str] | None = None
) -> dict[str, Findings]:
    """What devices of these classes (None: of all) have found of the release's variants, by class.

    A file that another release has too was measured there as well; that it failed there says nothing about this one.
    """
    found: dict[str, dict[str, list[Finding]]] = {name: {} for name in classes or ()}
    for name, variant in sorted(manifest.variants.items()):
        for one in tx.findings.of(variant.artifact.digest):
            if (classes is None or one.device_class in classes) and (not one.failed or one.release == manifest.release):
                of_class = found.setdefault(one.device_class, {})
                of_class.setdefault(name, []).append(Finding(one.device, one.run_s, one.failed))
    return dict(found)


def variants_in(
    tx: Transaction, release: Release, devices: Collection[DeviceId] | None = None
) -> tuple[VariantView, ...]:
    """What all devices, or these, have measured of the release's variants, by class."""
    views = []
    for device_class, found in sorted(findings_in(tx, release.manifest).items()):
        for variant, everybody in found.items():
            findings = [one for one in everybody if devices is None or one.device in devices]
            if findings:
                views.append(_variant_view(device_class, variant, findings))
    return tuple(views)


def _variant_view(device_class: str, variant: str, findings: Sequence[Finding]) -> VariantView:
    run_s = median_run_s(findings)
    return VariantView(
        device_class=device_class,
        variant=variant,
        devices=len(findings),
        failed=sum(one.failed for one in findings),
        run_s=run_s if run_s is not None and math.isfinite(run_s) else None,
    )
