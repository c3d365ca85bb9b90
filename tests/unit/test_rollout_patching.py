"""Which patches are worth having: from the file that plays the same part in another build."""

import pytest
from msgspec.structs import replace

from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of
from common.artifact.selftest import Exact, SelfTest
from common.ids import Digest
from controller.devices import Device
from controller.rollouts.patching import Lineage, PatchKey, bases_of, counterparts, wanted_patches
from tests.unit.fleet import CODEC, MODEL, V1, V2, device, saying


def build(version: str, *names: str) -> Variant:
    """A build of files of these names, the first being the ONNX file."""
    files = {name: ArtifactRef(digest_of(f"{name} {version}".encode()), 1) for name in names}
    return Variant(files, names[0], (), ())


@pytest.mark.parametrize(
    ("new", "old", "pairs"),
    [
        (("m.onnx",), ("m.onnx",), {"m.onnx": "m.onnx"}),
        (("new.onnx",), ("old.onnx",), {"new.onnx": "old.onnx"}),
        (("n.onnx", "n.data"), ("o.onnx", "o.data"), {"n.onnx": "o.onnx", "n.data": "o.data"}),
        (("m.onnx", "b", "c"), ("m.onnx", "a", "b"), {"m.onnx": "m.onnx", "b": "b", "c": "a"}),
        (("m.onnx", "m.data"), ("m.onnx",), {"m.onnx": "m.onnx"}),
        (("m.onnx",), ("m.onnx", "m.data"), {"m.onnx": "m.onnx"}),
    ],
)
def test_files_are_paired_by_their_part_then_by_name_then_by_place(
    new: tuple[str, ...], old: tuple[str, ...], pairs: dict[str, str]
) -> None:
    assert counterparts(build("2", *new), build("1", *old)) == pairs


def test_samples_are_paired_with_samples_and_never_with_weights() -> None:
    test = SelfTest(samples="samples", count=1, rules={"y": Exact()})
    weighted, sampled = build("1", "m.onnx", "weights"), replace(build("2", "m.onnx", "samples"), self_test=test)
    assert counterparts(sampled, weighted) == counterparts(weighted, sampled) == {"m.onnx": "m.onnx"}
    assert counterparts(sampled, sampled) == {"m.onnx": "m.onnx", "samples": "samples"}


def lineage(*builds: Variant) -> Lineage:
    return Lineage(bases=bases_of(MANIFEST, builds), codecs=("best", CODEC))


OLD, NEW = build(V1, "m.onnx", "m.data"), build(V2, "m.onnx", "m.data")
MANIFEST = ReleaseManifest(MODEL, V2, {"default": NEW})


def holding(*digests: Digest) -> Device:
    return saying(device(), held=digests)


def test_every_missing_file_wants_the_patch_from_its_counterpart() -> None:
    everything = tuple(file.digest for file in OLD.files.values())
    assert set(wanted_patches(holding(*everything), MANIFEST, lineage(OLD, NEW))) == {
        PatchKey(OLD.files[name].digest, NEW.files[name].digest, CODEC) for name in ("m.onnx", "m.data")
    }


def test_a_file_that_is_there_wants_nothing() -> None:
    held = (*(file.digest for file in OLD.files.values()), NEW.files["m.data"].digest)
    (key,) = wanted_patches(holding(*held), MANIFEST, lineage(OLD, NEW))
    assert key.target == NEW.artifact.digest


def test_weights_that_moved_out_of_the_file_are_not_patched_from_the_wrong_one() -> None:
    inside = build(V1, "m.onnx")
    (key,) = wanted_patches(holding(inside.artifact.digest), MANIFEST, lineage(inside))
    assert key.target == NEW.artifact.digest


def test_files_of_other_models_are_no_bases() -> None:
    assert wanted_patches(holding(digest_of(b"stranger")), MANIFEST, lineage(OLD, NEW)) == ()
