"""Bytes that are named by what they contain, and the manifest that says which bytes make up a release."""

from common.artifact.digest import Hasher, digest_of, hex_of
from common.artifact.manifest import (
    ArtifactRef,
    ReleaseManifest,
    Variant,
    decode_manifest,
    encode_manifest,
)
from common.artifact.tensor_spec import TensorSpec

__all__ = [
    "ArtifactRef",
    "Hasher",
    "ReleaseManifest",
    "TensorSpec",
    "Variant",
    "decode_manifest",
    "digest_of",
    "encode_manifest",
    "hex_of",
]
