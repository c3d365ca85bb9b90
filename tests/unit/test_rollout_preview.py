"""A preview says what a rollout would move, before anybody is told."""

import pytest

from common.errors import InvalidInput
from controller.rollouts.model import PhaseSpec, Preview
from controller.rollouts.patching import Lineage, PatchKey
from controller.rollouts.preview import preview
from tests.unit.fleet import CODEC, NOW, SIZE, V1, V2, a_spec, artifact, device, manifest, saying

KEY = PatchKey(artifact(V1).digest, artifact(V2).digest, CODEC)
LINEAGE = Lineage(artifacts=frozenset({artifact(V1).digest, artifact(V2).digest}), codecs=(CODEC,))
FLEET = [
    saying(device("patched"), held=(artifact(V1).digest,)),
    saying(device("there"), held=(artifact(V2).digest,)),
    device("unknown", connected=False),
    saying(device("old", capabilities=None), held=(artifact(V1).digest,)),
]


def of(lineage: Lineage = LINEAGE, sizes: dict[PatchKey, int] | None = None, **changes: object) -> Preview:
    return preview(
        a_spec(**changes), FLEET, manifest=manifest(), lineage=lineage, patch_bytes=sizes or {}, salt="s", now=NOW
    )


def test_devices_are_counted_by_how_the_release_would_reach_them() -> None:
    (phase,) = of(Lineage(artifacts=LINEAGE.artifacts, codecs=(CODEC,), decided={KEY: True}), {KEY: 7}).phases
    assert (phase.devices, phase.online, phase.patched, phase.unchanged, phase.full) == (4, 3, 1, 1, 2)
    assert (phase.bytes, phase.full_bytes, phase.undecided) == (7 + 2 * SIZE, 4 * SIZE, 0)


def test_a_patch_that_is_not_decided_counts_as_a_full_download() -> None:
    (phase,) = of().phases
    assert (phase.patched, phase.full, phase.undecided) == (0, 3, 1)


def test_devices_that_no_variant_fits_are_named() -> None:
    unfit = preview(
        a_spec(), FLEET, manifest=manifest(variants=["int8"]), lineage=LINEAGE, patch_bytes={}, salt="s", now=NOW
    )
    assert unfit.phases[0].unfit == 4
    assert unfit.bytes == 0


def test_sums_run_over_phases() -> None:
    whole = of(phases=(PhaseSpec(count=1), PhaseSpec(percent=100)))
    assert [phase.devices for phase in whole.phases] == [1, 3]
    assert whole.full_bytes == 4 * SIZE


def test_a_preview_refuses_what_creating_would_refuse() -> None:
    with pytest.raises(InvalidInput, match="matches no device"):
        of(selector='id == "nobody"')
