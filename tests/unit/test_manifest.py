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
from common.errors import IntegrityFailure
from common.ids import ModelName, Version

FILE = ArtifactRef(digest_of(b"model"), 5)
DATA = ArtifactRef(digest_of(b"weights"), 7)
INPUTS, OUTPUTS = (TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1,)),)
VARIANT = Variant({"model.onnx": FILE, "model.onnx.data": DATA}, "model.onnx", INPUTS, OUTPUTS)


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
