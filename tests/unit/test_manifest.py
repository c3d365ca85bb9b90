"""Equal manifests are equal bytes, and what is not a manifest is a named error."""

import pytest

from common.artifact import (
    ArtifactRef,
    ReleaseManifest,
    TensorSpec,
    Variant,
    decode_manifest,
    digest_of,
    encode_manifest,
)
from common.artifact.pipeline import Pipeline, PipelineStep
from common.artifact.selftest import Close, Exact, Rule, SelfTest, Top1
from common.artifact.serving import Padding, Route, ServingTerms
from common.errors import IntegrityFailure
from common.ids import ModelName, Version

FILE = ArtifactRef(digest_of(b"model"), 5)
DATA = ArtifactRef(digest_of(b"weights"), 7)
INPUTS, OUTPUTS = (TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1,)),)
VARIANT = Variant({"model.onnx": FILE, "model.onnx.data": DATA}, "model.onnx", INPUTS, OUTPUTS)

RULES: dict[str, Rule] = {"y": Close(rtol=0.001, atol=0.5), "label": Exact(), "scores": Top1()}
SELF_TEST = SelfTest(samples="selftest.safetensors", count=3, rules=RULES, latency_max_s=0.2)
TESTED = Variant({**VARIANT.files, "selftest.safetensors": DATA}, "model.onnx", INPUTS, OUTPUTS, SELF_TEST)
WATCHED = Variant(
    {**TESTED.files, "reference.json": FILE}, "model.onnx", INPUTS, OUTPUTS, SELF_TEST, reference="reference.json"
)

SERVING = ServingTerms(
    cache_bytes=1_000_000,
    routes=(Route('load.waiting > 4 && input["x"].shape[0] == 1', ModelName("detector-small")),),
    padding={"x": Padding(axis=1, value=0.5, mask="m"), "z": Padding(axis=2)},
)
SERVED = Variant(VARIANT.files, "model.onnx", INPUTS, OUTPUTS, serving=SERVING)

CROP = PipelineStep(plugin="acme.crop", version="1.2.0", code=(FILE.digest,), parameters={"b": 1, "a": [0.5, "x"]})
STEPS = Pipeline(
    model_inputs=INPUTS,
    model_outputs=OUTPUTS,
    before=(
        PipelineStep(plugin="acme.crop", version="1.2.0", code=(FILE.digest,), parameters={"b": 1, "a": [0.5, "x"]}),
    ),
    after=(PipelineStep(plugin="edgeferry.top_k", version="1"),),
)
PIPED = Variant(
    {**VARIANT.files, "ops.so": DATA},
    "model.onnx",
    INPUTS,
    (TensorSpec("top", "INT64", (-1, 1)),),
    pipeline=STEPS,
    custom_ops=("ops.so",),
)


def manifest(**variants: Variant) -> ReleaseManifest:
    return ReleaseManifest(ModelName("detector"), Version("1.4.0"), variants)


def test_a_manifest_reads_back_as_it_was_written() -> None:
    original = manifest(default=VARIANT, int8=VARIANT)
    assert decode_manifest(encode_manifest(original)) == original
    assert original.variants["default"].artifact == FILE
    assert original.variants["default"].size == 12


def test_the_order_of_variants_does_not_change_the_bytes() -> None:
    assert encode_manifest(manifest(a=VARIANT, b=VARIANT)) == encode_manifest(manifest(b=VARIANT, a=VARIANT))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"model":"m","version":"1","variants":{}}',
        encode_manifest(manifest(a=VARIANT)).replace(b'"format":1', b'"format":2'),
        encode_manifest(manifest(a=VARIANT)).replace(b"sha256:", b"sha512:"),
        b" " * 300_000,
        b'{"new":' + b"[" * 100_000,
        b'{"model":"\xff"}',
        encode_manifest(manifest(a=WATCHED)).replace(b'"reference":"reference.json"', b'"reference":"other.json"'),
        encode_manifest(manifest(a=WATCHED)).replace(b'"reference":"reference.json"', b'"reference":"model.onnx"'),
        encode_manifest(manifest(a=WATCHED)).replace(
            b'"reference":"reference.json"', b'"reference":"selftest.safetensors"'
        ),
        encode_manifest(manifest(a=VARIANT)).replace(b'"model":"model.onnx"', b'"model":"other.onnx"'),
        *(
            encode_manifest(manifest(a=VARIANT)).replace(b"model.onnx.data", name)
            for name in (
                b"../model.data",
                b"..",
                b".hidden",
                b"/etc/passwd",
                b"a/b",
                b"a\\nb",
                b"data\\n",
                b"a" * 129,
                b"",
            )
        ),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityFailure):
        decode_manifest(data)


def test_a_self_test_is_signed_with_the_rest_and_its_samples_are_a_file_like_any_other() -> None:
    tested = decode_manifest(encode_manifest(manifest(default=TESTED))).variants["default"]
    assert tested == TESTED
    assert tested.size == TESTED.size == 19
    assert tested.data_files == VARIANT.data_files == ("model.onnx.data",)


def test_who_knows_no_self_tests_finds_the_samples_among_the_files() -> None:
    known = encode_manifest(manifest(default=TESTED)).replace(b'"self_test":', b'"unknown":')
    assert decode_manifest(known).variants["default"].files == TESTED.files


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b'"samples":"selftest.safetensors"', b'"samples":"other.safetensors"'),
        (b'"samples":"selftest.safetensors"', b'"samples":"model.onnx"'),
        (b'"count":3', b'"count":0'),
        (b'"count":3', b'"count":33'),
        (b'"rtol":0.001', b'"rtol":-0.001'),
        (b'"rtol":0.001', b'"rtol":1e999'),
        (b'"rule":"top1"', b'"rule":"top5"'),
        (b'"latency_max_s":0.2', b'"latency_max_s":0'),
    ],
)
def test_a_self_test_that_cannot_be_is_refused(right: bytes, wrong: bytes) -> None:
    data = encode_manifest(manifest(default=TESTED))
    assert right in data
    with pytest.raises(IntegrityFailure):
        decode_manifest(data.replace(right, wrong))


def test_samples_and_a_reference_are_no_data_of_the_model() -> None:
    assert VARIANT.data_files == TESTED.data_files == WATCHED.data_files == ("model.onnx.data",)
    assert WATCHED.extra_files == ("selftest.safetensors", "reference.json")


def test_steps_and_libraries_are_signed_with_the_rest() -> None:
    data = encode_manifest(manifest(default=PIPED))
    piped = decode_manifest(data).variants["default"]
    assert piped == PIPED
    assert piped.data_files == VARIANT.data_files
    assert b'"parameters":{"a":[0.5,"x"],"b":1}' in data
    assert b"pipeline" not in encode_manifest(manifest(default=VARIANT))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b'"custom_ops":["ops.so"]', b'"custom_ops":["none.so"]'),
        (b'"custom_ops":["ops.so"]', b'"custom_ops":["model.onnx"]'),
        (b'"custom_ops":["ops.so"]', b'"custom_ops":["ops.so","ops.so"]'),
        (b'"plugin":"acme.crop"', b'"plugin":"../crop"'),
        (b'"version":"1.2.0"', b'"version":">=1.2"'),
        (b'"code":["sha256:', b'"code":["sha512:'),
        (b'"plugin":"acme.crop"', b'"plugin":"edgeferry.crop"'),
        (b'"plugin":"edgeferry.top_k"', b'"plugin":"acme.top_k"'),
        (b'"after":[', b'"after":[' + b'{"plugin":"edgeferry.top_k","version":"1"},' * 8),
        (b'"a":[0.5,"x"]', b'"a":"' + b"x" * 70_000 + b'"'),
    ],
)
def test_steps_and_libraries_that_cannot_be_are_refused(right: bytes, wrong: bytes) -> None:
    data = encode_manifest(manifest(default=PIPED))
    assert right in data
    with pytest.raises(IntegrityFailure):
        decode_manifest(data.replace(right, wrong))
