"""Patches in memory, for tests."""

from collections.abc import Sequence

import numpy as np

from common import delta
from common.artifact.digest import digest_of
from common.artifact.manifest import ArtifactRef
from common.artifact.source import BytesSource
from common.delta.layout import Header, Operations, write_block, write_header


def patch_between(base: bytes, target: bytes) -> bytes:
    """The patch that `make` writes."""
    parts: list[bytes] = []
    delta.make(BytesSource(base), BytesSource(target), parts.append)
    return b"".join(parts)


def rebuilt(base: bytes, patch: bytes, target: bytes | ArtifactRef) -> bytes:
    """What `apply` writes when told to expect `target`."""
    reference = target if isinstance(target, ArtifactRef) else reference_to(target)
    parts: list[bytes] = []
    delta.apply(BytesSource(base), BytesSource(patch), parts.append, target=reference)
    return b"".join(parts)


def reference_to(data: bytes) -> ArtifactRef:
    return ArtifactRef(digest_of(data), len(data))


def crafted_patch(base: bytes, target: bytes, operations: Sequence[tuple[int, int, int]], literals: bytes) -> bytes:
    """A patch of one block with the given (literal, length, offset) operations, sensible or not."""
    parts: list[bytes] = []
    write_header(parts.append, Header(reference_to(base), reference_to(target)))
    columns = np.array(operations, np.int64).reshape(-1, 3)
    write_block(parts.append, Operations(columns[:, 0], columns[:, 1], columns[:, 2]), 0, literals)
    return b"".join(parts)
