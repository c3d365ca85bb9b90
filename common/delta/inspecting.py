"""Saying what a patch is for and what it is made of, without the base and without believing it."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import msgspec

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.artifact.weights import Weight
from common.delta.layout import Header, read_header
from common.delta.operations import Add, Copy, Literal, Operation, TensorBlock
from common.delta.reading import Frame, Placed, Section, read

CONTROL = "control"
"""What the header, the list of operations and the sizes of their parts take."""
TENSORS_MAX = 200_000


class OperationTotals(msgspec.Struct, frozen=True):
    """All operations of one kind: `output_bytes` of the target they write, `patch_bytes` they take in the patch."""

    kind: str
    count: int
    output_bytes: int
    patch_bytes: int


class TensorTotals(msgspec.Struct, frozen=True, kw_only=True):
    """What was done for one tensor: how many of its bytes each kind of operation writes, and what its tensor blocks
    take in the patch (literals and additions share frames with others and are not counted).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    output_bytes: dict[str, int]
    patch_bytes: int


class PatchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a patch is for and what it is made of; sizes in bytes. `base` and `target` are the first hex digits of their
    SHA-256.
    """

    codec: str
    base: str
    base_bytes: int
    target: str
    target_bytes: int
    patch_bytes: int
    operations: tuple[OperationTotals, ...]
    tensors: tuple[TensorTotals, ...] = ()


def inspect(patch: ByteSource, weights: Sequence[Weight] = ()) -> PatchSummary:
    """What `patch` is for and made of, without the base; `IntegrityFailure` when its structure is damaged.

    With the `weights` of the target also what was done for each tensor. What payloads hold is not looked at: only
    applying a patch proves it.
    """
    header, place = read_header(patch)
    totals, tensors = _Totals(place), _Tensors(weights)
    for step in read(patch, header, place, None):
        if isinstance(step, Section):
            totals.take_section(step)
        else:
            totals.take(step.operation)
            tensors.take(step)
    return _summary(patch, header, totals, tensors)


def _summary(patch: ByteSource, header: Header, totals: "_Totals", tensors: "_Tensors") -> PatchSummary:
    return PatchSummary(
        codec=header.codec,
        base=header.base.prefix.hex(),
        base_bytes=header.base.size,
        target=header.target.prefix.hex(),
        target_bytes=header.target.size,
        patch_bytes=patch.size,
        operations=totals.operations(),
        tensors=tuple(tensors.found()),
    )


class _Totals:
    def __init__(self, header_bytes: int) -> None:
        self._counts: dict[str, list[int]] = {}
        self._add(CONTROL, 0, 0, header_bytes)

    def take_section(self, section: Section) -> None:
        self._add(CONTROL, 1, 0, section.control)
        # Which streams a section has says which kinds of operation: what they take is known for all of them together.
        for kind, size in (("literal", section.literals), ("add", section.differences), ("frame", section.frame)):
            if size:
                self._add(kind, 0, 0, size)

    def take(self, operation: Operation | Frame) -> None:
        payload = len(operation.payload) if isinstance(operation, TensorBlock) else 0
        self._add(_kind(operation), 1, operation.length, payload)

    def operations(self) -> tuple[OperationTotals, ...]:
        return tuple(OperationTotals(kind, *counts) for kind, counts in self._counts.items())

    def _add(self, kind: str, *numbers: int) -> None:
        counts = self._counts.setdefault(kind, [0, 0, 0])
        for index, number in enumerate(numbers):
            counts[index] += number


class _Tensors:
    """What was done where, for the tensors of the target, in file order."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = weights[:TENSORS_MAX]
        self._written: list[dict[str, int]] = [{} for _ in self._weights]
        self._payloads = [0] * len(self._weights)

    def take(self, step: Placed) -> None:
        operation = step.operation
        end = step.start + operation.length
        index = bisect_right(self._weights, step.start, key=lambda weight: weight.span.end)
        while index < len(self._weights) and self._weights[index].span.start < end:
            span = self._weights[index].span
            written, kind = self._written[index], _kind(operation)
            written[kind] = written.get(kind, 0) + _common(span, Span(step.start, end))
            if isinstance(operation, TensorBlock):
                self._payloads[index] += len(operation.payload)
            index += 1

    def found(self) -> Iterator[TensorTotals]:
        for weight, written, payload in zip(self._weights, self._written, self._payloads, strict=True):
            yield TensorTotals(
                name=weight.name, dtype=weight.kind, shape=weight.shape, output_bytes=written, patch_bytes=payload
            )


def _kind(operation: Operation | Frame) -> str:
    match operation:
        case Copy():
            return "copy"
        case Literal():
            return "literal"
        case Add():
            return "add"
        case Frame():
            return "frame"
        case TensorBlock():
            return operation.method.name.lower().replace("_", " ")


def _common(one: Span, other: Span) -> int:
    return max(0, min(one.end, other.end) - max(one.start, other.start))
