"""The differences of two files about which nothing is known: graphs, names and headers of models, and opaque files.

A target is laid over the base in runs and written as what differs (`alignment`, `emission`). A small one is also
parsed byte by byte for the cheapest operations, under several assumptions about what will compress (`parsing`), and
compared with sending all of it as literals: names that changed throughout a graph go best that way, because literals
may lean on what is left of the base. What really comes out smallest is taken (`pricing`). This is deterministic and
needs at most about 100 MB.
"""

from collections.abc import Callable, Iterator, Sequence

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.delta.generic import emission, parsing, pricing
from common.delta.generic.alignment import Aligner
from common.delta.operations import Add, Copy, Literal

SMALL_BYTES_MAX = 1 << 20
"""Base and target of at most this much each are small."""
ASSUMPTIONS = (parsing.Costs(0.5, 4.0), parsing.Costs(1.0, 0.0), parsing.Costs(0.4, 16.0), parsing.Costs(0.75, 1.0))
"""All compresses somewhat; nothing does; literals do and only long copies pay; little does."""
FUSED_BYTES = (0, 64)
PARSED_PATCH_BYTES_MAX = 2048
"""What takes more in the patch has changed too much for a byte here and there to matter."""

__all__ = ["diff"]


def diff(
    base: ByteSource,
    base_spans: Sequence[Span],
    target: ByteSource,
    target_span: Span,
    *,
    shift: int | None = None,
    passed: Callable[[int], object] = lambda _: None,
) -> Iterator[Copy | Add | Literal]:
    """The operations that write exactly `target_span`, in order; each brings at most 1 MiB of bytes.

    The base is searched in `base_spans`, and at `shift` (base offset minus target offset; 0 when not known) first.
    `passed` is told how far in the target the search has come; an exception from it ends the work.
    """
    runs = Aligner(base, base_spans, target, passed).runs(target_span, shift or 0)
    found = emission.operations(base, target, runs)
    base_bytes = sum(span.end - span.start for span in base_spans)
    if max(base_bytes, target_span.end - target_span.start) > SMALL_BYTES_MAX:
        yield from found
        return
    laid_over = list(found)
    if len(laid_over) > 1 or any(isinstance(operation, Literal) for operation in laid_over):
        everything = Literal(target.read_at(target_span.start, target_span.end - target_span.start))

        def price(candidate: list[Copy | Add | Literal]) -> int:
            return pricing.written_bytes(candidate, target_span.start, base, target.size)

        laid_over = min([laid_over, [everything]], key=price)
        if price(laid_over) <= PARSED_PATCH_BYTES_MAX:
            parsed = _parsed(base, base_spans, target, target_span, shift or 0)
            laid_over = min([laid_over, *parsed], key=price)
    yield from laid_over


def _parsed(
    base: ByteSource, base_spans: Sequence[Span], target: ByteSource, span: Span, shift: int
) -> Iterator[list[Copy | Add | Literal]]:
    """What is cheapest under each assumption."""
    for steps in parsing.Parser(base, base_spans, target).paths(span, shift, ASSUMPTIONS):
        for fused in FUSED_BYTES:
            yield parsing.operations(steps, base, target, span.start, fused=fused)
