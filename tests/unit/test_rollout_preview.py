"""A preview says what a rollout would move, before anybody is told."""

import pytest

from common.artifact import ArtifactRef, digest_of
from common.errors import InvalidInput
from common.wire import PatchOffer
from controller.rollouts.model import PhaseSpec, Preview
from controller.rollouts.preview import preview
from controller.rollouts.ways import Catalogue
from tests.unit.fleet import CODEC, LINEAGE, NOW, SIZE, V1, V2, a_spec, artifact, device, manifest, saying

READY = Catalogue((PatchOffer(artifact(V1).digest, artifact(V2), ArtifactRef(digest_of(b"patch"), 7), CODEC),))
ENVELOPE = ArtifactRef(digest_of(b"envelope"), 300)
FLEET = [
    saying(device("patched"), held=(artifact(V1).digest,)),
    saying(device("there"), held=(artifact(V2).digest,)),
    device("unknown", connected=False),
    saying(device("old", capabilities=None), held=(artifact(V1).digest,)),
]


def of(catalogue: Catalogue = READY, variants: tuple[str, ...] = ("default",), **changes: object) -> Preview:
    return preview(
        a_spec(**changes),
        FLEET,
        manifest=manifest(variants=variants),
        envelope=ENVELOPE,
        lineage=LINEAGE,
        catalogue=catalogue,
        salt="s",
        now=NOW,
    )


def test_devices_are_counted_by_how_the_release_would_reach_them() -> None:
    (phase,) = of().phases
    assert (phase.devices, phase.online, phase.patched, phase.unchanged, phase.full) == (4, 3, 1, 1, 2)
    assert (phase.bytes, phase.full_bytes, phase.undecided) == (7 + 2 * SIZE, 4 * SIZE, 0)


def test_a_patch_that_is_not_decided_counts_as_a_full_download() -> None:
    (phase,) = of(Catalogue()).phases
    assert (phase.patched, phase.full, phase.undecided) == (0, 3, 1)


@pytest.mark.parametrize(
    ("max_bytes", "over"), [(None, 0), (SIZE + 300, 0), (SIZE + 299, 2), (307, 2), (306, 3), (299, 4)]
)
def test_devices_that_would_exceed_the_byte_budget_are_counted_with_their_manifest(
    max_bytes: int | None, over: int
) -> None:
    assert of(max_bytes=max_bytes).phases[0].over_budget == over


def test_devices_that_no_variant_fits_are_named() -> None:
    unfit = of(variants=("int8",), max_bytes=1)
    assert (unfit.phases[0].unfit, unfit.phases[0].over_budget) == (4, 0)
    assert unfit.bytes == 0


def test_sums_run_over_phases() -> None:
    whole = of(phases=(PhaseSpec(count=1), PhaseSpec(percent=100)))
    assert [phase.devices for phase in whole.phases] == [1, 3]
    assert whole.full_bytes == 4 * SIZE


def test_a_preview_refuses_what_creating_would_refuse() -> None:
    with pytest.raises(InvalidInput, match="matches no device"):
        of(selector='id == "nobody"')
