"""Patches in memory, for tests: made by the codec, or put together by hand, sensible or not."""

from common import delta
from common.artifact.digest import digest_of
from common.artifact.manifest import ArtifactRef
from common.artifact.source import BytesSource
from common.delta.layout import ADD, BLOCK, COPY, LITERAL, Header, fingerprint, write_header
from common.delta.tensors import NO_BASE, DType, Method
from common.delta.varint import varint, zigzag


def patch_between(base: bytes, target: bytes, codec: str = delta.CODECS[0]) -> bytes:
    """The patch that `make` writes."""
    parts: list[bytes] = []
    delta.make(BytesSource(base), BytesSource(target), parts.append, codec=codec)
    return b"".join(parts)


def rebuilt(base: bytes, patch: bytes, target: bytes | ArtifactRef) -> bytes:
    """What `apply` writes when told to expect `target`."""
    reference = target if isinstance(target, ArtifactRef) else reference_to(target)
    parts: list[bytes] = []
    delta.apply(BytesSource(base), BytesSource(patch), parts.append, target=reference)
    return b"".join(parts)


def reference_to(data: bytes) -> ArtifactRef:
    return ArtifactRef(digest_of(data), len(data))


def header(base: bytes, target: bytes, codec: str = delta.CODECS[0]) -> bytes:
    return write_header(Header(codec, fingerprint(reference_to(base)), fingerprint(reference_to(target))))


def section(control: bytes, literals: bytes = b"", differences: bytes = b"", payloads: bytes = b"") -> bytes:
    """A section whose streams are as they are; empty ones are absent."""
    streams = (control, literals, differences, payloads)
    flags = sum(bool(stream) << 2 * index for index, stream in enumerate(streams))
    return bytes((flags,)) + b"".join(varint(len(stream)) for stream in streams if stream) + b"".join(streams)


def copy(length: int, shift_change: int = 0) -> bytes:
    return varint(length << 2 | COPY) + varint(zigzag(shift_change))


def add(length: int, shift_change: int = 0) -> bytes:
    return varint(length << 2 | ADD) + varint(zigzag(shift_change))


def literal(length: int) -> bytes:
    return varint(length << 2 | LITERAL)


def block(
    count: int,
    payload_bytes: int,
    *,
    method: int = Method.DIFFERENCE,
    dtype: int = DType.I8,
    old: int = DType.I8,
    columns: int | None = None,
    shift_change: int = 0,
) -> bytes:
    shift = b"" if old == NO_BASE else varint(zigzag(shift_change))
    kinds = bytes((method, old << 4 | dtype))
    return varint(count << 2 | BLOCK) + kinds + varint(columns or count) + varint(payload_bytes) + shift
