"""What operations really cost in a patch: the bytes that they take once written and compressed."""

from collections.abc import Sequence

from common.artifact.source import ByteSource
from common.delta import sections
from common.delta.operations import Add, Copy, Literal


def written_bytes(operations: Sequence[Copy | Add | Literal], start: int, base: ByteSource, target_size: int) -> int:
    """Bytes of `operations` as one section, from `start` of the target on."""
    return len(sections.write_section(operations, start, target_size, base))
