"""What operations really cost in a patch: the bytes that they take once written and compressed."""

from collections.abc import Sequence

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta import layout
from common.delta.generic.prefixes import literal_prefix
from common.delta.operations import Add, Copy, Literal


def written_bytes(
    operations: Sequence[Copy | Add | Literal],
    start: int,
    base: ByteSource,
    base_spans: Sequence[Span],
    target_size: int,
) -> int:
    """Bytes of `operations` as one section, from `start` of the target on; `base_spans` may help their literals."""
    literals = b"".join(operation.data for operation in operations if isinstance(operation, Literal))
    prefix = literal_prefix(base, base_spans, literals)
    return len(layout.write_section(operations, start, target_size, base.read_at, prefix))
