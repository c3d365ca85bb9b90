"""The release manifest: what a release is made of, and the bytes it is signed as.

A manifest names a model and a version, and for each variant (a build for a kind of device: `default`, `int8`...) the
files and the tensors that go in and out. It holds nothing that differs between two publications of the same bytes (no
time, no publisher), so the same release always encodes to the same bytes and the same digest. It travels inside a DSSE
envelope (`common.trust`), which is itself an artifact.

A variant is one ONNX file and the files that it keeps weights in (external data), each under the name by which the ONNX
file refers to it: a plain name, so that a device may use it inside a folder of its own as it stands. It may carry a
self-test and a reference for drift: one file more each, which devices that know nothing of them take along like any
other.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from common.artifact.selftest import SelfTest
from common.errors import IntegrityFailure
from common.ids import Digest, ModelName, ReleaseRef, Version

MANIFEST_BYTES_MAX = 256 * 1024
VARIANTS_MAX = 16
FILES_PER_VARIANT_MAX = 16
FILE_NAME = r"^[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_])?$(?!\n)"
"""Letters, digits and inner dots, underscores and hyphens: no folder, no "..", nothing a file system reads twice."""
PAYLOAD_TYPE = "application/vnd.edgeferry.release+json"
DEFAULT_VARIANT = "default"


class ArtifactRef(msgspec.Struct, frozen=True, order=True):
    """Bytes by name: the digest, and the length in bytes so that nobody downloads more than was promised."""

    digest: Annotated[Digest, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
    size: Annotated[int, Meta(ge=0)]


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output; `datatype` as in the Open Inference Protocol V2 (`FP32`...), -1 for an open axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Variant(msgspec.Struct, frozen=True, omit_defaults=True):
    """One build of the release: `files` by name, `model` the name of the ONNX file, the others its external data, the
    samples of its self-test, and the `reference` for drift (`common.monitoring`).
    """

    files: Annotated[
        dict[Annotated[str, Meta(pattern=FILE_NAME)], ArtifactRef],
        Meta(min_length=1, max_length=FILES_PER_VARIANT_MAX),
    ]
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    self_test: SelfTest | None = None
    reference: Annotated[str, Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        named = (self.model, *self.extra_files)
        for name in named:
            if name not in self.files:
                raise ValueError(f"there is no file {name[:80]!r} among the files")
        if len(set(named)) < len(named):
            raise ValueError("one file is named as two of the model, the samples and the reference")

    @property
    def artifact(self) -> ArtifactRef:
        """The ONNX file."""
        return self.files[self.model]

    @property
    def data_files(self) -> tuple[str, ...]:
        """The names of the files that the ONNX file keeps weights in, in order."""
        return tuple(sorted(self.files.keys() - {self.model, *self.extra_files}))

    @property
    def extra_files(self) -> tuple[str, ...]:
        """The names of the files that the model does without: the samples of the self-test, the reference."""
        samples = (self.self_test.samples,) if self.self_test else ()
        return (*samples, self.reference) if self.reference else samples

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(reference.size for reference in self.files.values())


class ReleaseManifest(msgspec.Struct, frozen=True):
    """Everything a device must know to fetch, check and serve a release."""

    model: ModelName
    version: Version
    variants: Annotated[dict[str, Variant], Meta(min_length=1, max_length=VARIANTS_MAX)]
    format: Annotated[int, Meta(ge=1, le=1)] = 1

    @property
    def release(self) -> ReleaseRef:
        return ReleaseRef(self.model, self.version)


def encode_manifest(manifest: ReleaseManifest) -> bytes:
    """The canonical bytes (JSON, keys sorted, no spaces): equal manifests encode equally."""
    return msgspec.json.encode(manifest, order="sorted")


def decode_manifest(data: bytes) -> ReleaseManifest:
    """The manifest in `data`, or `IntegrityFailure` that names the path of what is wrong."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise IntegrityFailure(f"manifest is {len(data)} bytes, the limit is {MANIFEST_BYTES_MAX}")
    try:
        return msgspec.json.decode(data, type=ReleaseManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityFailure(f"not a release manifest: {error}") from error
