"""The release manifest: what a release is made of, and the bytes it is signed as.

A manifest names a model and a version, and for each variant (a build for a kind of device: `default`, `int8`...) the
files and the tensors that go in and out. It holds nothing that differs between two publications of the same bytes (no
time, no publisher), so the same release always encodes to the same bytes and the same digest. It travels inside a DSSE
envelope (`common.trust`), which is itself an artifact.

A variant is one ONNX file and the files that it keeps weights in (external data), each under the name by which the ONNX
file refers to it: a plain name, so that a device may use it inside a folder of its own as it stands. It may carry a
self-test and a reference for drift: one file more each, which devices that know nothing of them take along like any
other. It may declare steps around the model (`pipeline`), name shared libraries with operators of its own
(`custom_ops`) among its files, and say how it is served (`common.artifact.serving`).
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from common.artifact.pipeline import Pipeline
from common.artifact.selftest import SelfTest
from common.artifact.serving import ServingTerms
from common.artifact.tensor_spec import TensorSpec
from common.errors import IntegrityFailure
from common.ids import Digest, ModelName, ReleaseRef, Version

MANIFEST_BYTES_MAX = 256 * 1024
VARIANTS_MAX = 16
FILES_PER_VARIANT_MAX = 16
FILE_NAME = r"^[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_])?$(?!\n)"
"""Letters, digits and inner dots, underscores and hyphens: no folder, no "..", nothing a file system reads twice."""
PAYLOAD_TYPE = "application/vnd.edgeferry.release+json"
DEFAULT_VARIANT = "default"
MEASURED_VARIANT = "auto"
"""What a device says that leaves its variant to measurement; no variant has this name."""


class ArtifactRef(msgspec.Struct, frozen=True, order=True):
    """Bytes by name: the digest, and the length in bytes so that nobody downloads more than was promised."""

    digest: Annotated[Digest, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
    size: Annotated[int, Meta(ge=0)]


class Variant(msgspec.Struct, frozen=True, omit_defaults=True):
    """One build of the release: `files` by name, `model` the name of the ONNX file, the others its external data, the
    samples of its self-test, the `reference` for drift (`common.monitoring`), and libraries with `custom_ops`.

    `inputs` and `outputs` are what callers send and get: with a `pipeline` not those of the ONNX file.
    """

    files: Annotated[
        dict[Annotated[str, Meta(pattern=FILE_NAME)], ArtifactRef],
        Meta(min_length=1, max_length=FILES_PER_VARIANT_MAX),
    ]
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    self_test: SelfTest | None = None
    pipeline: Pipeline | None = None
    custom_ops: tuple[str, ...] = ()
    serving: ServingTerms | None = None
    reference: Annotated[str, Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        for name in self._named:
            if name not in self.files:
                raise ValueError(f"there is no file {name[:80]!r} among the files")
        if len(set(self._named)) != len(self._named):
            raise ValueError("one file is named as two of the model, the samples, the reference and the libraries")

    @property
    def artifact(self) -> ArtifactRef:
        """The ONNX file."""
        return self.files[self.model]

    @property
    def data_files(self) -> tuple[str, ...]:
        """The names of the files that the ONNX file keeps weights in, in order."""
        return tuple(sorted(self.files.keys() - set(self._named)))

    @property
    def extra_files(self) -> tuple[str, ...]:
        """The names of the files that the model does without: the samples of the self-test, the reference."""
        samples = (self.self_test.samples,) if self.self_test else ()
        return (*samples, self.reference) if self.reference else samples

    @property
    def _named(self) -> tuple[str, ...]:
        """Every file that has a part of its own."""
        return (self.model, *self.extra_files, *self.custom_ops)

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
