"""Which tensor of the base each tensor of the target should be made from.

In this order: the same bytes (under the same name or any other), the same name with the same or a convertible shape,
the same type and shape in file order. What finds no partner is new. A poor partner costs bytes, never correctness: the
encoder compares what it gives with going without.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.artifact.protobuf import Span
from common.artifact.source import PIECE_BYTES, ByteSource
from common.artifact.weights import Weight

TENSOR_BYTES_MIN = 64
"""Smaller tensors are left to the byte diff around them: a block of their own would cost more than it saves."""

CASTS = {("F32", "I8"), ("F32", "F16"), ("F32", "BF16"), ("F16", "F32"), ("BF16", "F32")}
"""Element types of base and target between which `common.delta.tensors` can convert."""
SAMPLE_BYTES = 64
TWINS_TRIED_MAX = 4
"""Base tensors compared in full with one of the target; there are models with thousands of tensors of zeros."""


class Pair(NamedTuple):
    """A tensor of the target, and the one of the base to make it from; `same` when their bytes are equal."""

    new: Weight
    old: Weight | None
    same: bool


class Part:
    """Some bytes of a source as a source."""

    def __init__(self, source: ByteSource, span: Span) -> None:
        self._source = source
        self._span = span

    @property
    def size(self) -> int:
        return self._span.end - self._span.start

    def read_at(self, offset: int, length: int) -> bytes:
        return self._source.read_at(self._span.start + offset, max(0, min(length, self.size - offset)))


def pair(base: ByteSource, old: Sequence[Weight], target: ByteSource, new: Sequence[Weight]) -> list[Pair]:
    """The tensors of the target worth a look, in file order, each with its partner in the base."""
    old = [weight for weight in old if _length(weight) >= TENSOR_BYTES_MIN]
    new = [weight for weight in new if _length(weight) >= TENSOR_BYTES_MIN]
    by_name = _first_by_name(old)
    twins = _Twins(base, old)
    pairs: list[Pair] = []
    for weight in new:
        namesake = by_name.get(weight.name)
        if namesake is not None and _equal(base, namesake.span, target, weight.span):
            pairs.append(Pair(weight, namesake, same=True))
        elif (twin := twins.of(target, weight)) is not None:
            pairs.append(Pair(weight, twin, same=True))
        else:
            pairs.append(Pair(weight, namesake if namesake and comparable(namesake, weight) else None, same=False))
    return _with_lookalikes(pairs, old)


def comparable(old: Weight, new: Weight) -> bool:
    """Whether `new` can be made from `old`: as many elements of the same or a convertible type, or the same type and
    the same rows, some more or some less.
    """
    if math.prod(old.shape) == math.prod(new.shape):
        return old.kind == new.kind or (old.kind, new.kind) in CASTS
    return old.kind == new.kind and len(old.shape) > 1 and old.shape[1:] == new.shape[1:]


def _with_lookalikes(pairs: list[Pair], old: Sequence[Weight]) -> list[Pair]:
    taken = {each.old.span for each in pairs if each.old is not None}
    free: dict[tuple[str, tuple[int, ...]], list[Weight]] = defaultdict(list)
    for weight in reversed(old):
        if weight.span not in taken:
            free[weight.kind, weight.shape].append(weight)
    found = []
    for each in pairs:
        alike = free[each.new.kind, each.new.shape]
        found.append(each._replace(old=alike.pop()) if each.old is None and alike else each)
    return found


class _Twins:
    """Finds a base tensor with the same bytes: those that agree in a sample of them are compared in full."""

    def __init__(self, base: ByteSource, old: Iterable[Weight]) -> None:
        self._base = base
        self._by_sample: dict[bytes, list[Weight]] = defaultdict(list)
        for weight in old:
            self._by_sample[_sample(base, weight.span)].append(weight)

    def of(self, target: ByteSource, weight: Weight) -> Weight | None:
        alike = self._by_sample.get(_sample(target, weight.span), [])[:TWINS_TRIED_MAX]
        return next((each for each in alike if _equal(self._base, each.span, target, weight.span)), None)


def _sample(source: ByteSource, span: Span) -> bytes:
    start, end = span
    places = (start, (start + end) // 2, max(start, end - SAMPLE_BYTES))
    parts = (source.read_at(place, min(SAMPLE_BYTES, end - place)) for place in places)
    return (end - start).to_bytes(8, "little") + b"".join(parts)


def _first_by_name(weights: Iterable[Weight]) -> dict[str, Weight]:
    found: dict[str, Weight] = {}
    for weight in weights:
        found.setdefault(weight.name, weight)
    return found


def _equal(base: ByteSource, old: Span, target: ByteSource, new: Span) -> bool:
    length = new.end - new.start
    if old.end - old.start != length:
        return False
    for place in range(0, length, PIECE_BYTES):
        step = min(PIECE_BYTES, length - place)
        if base.read_at(old.start + place, step) != target.read_at(new.start + place, step):
            return False
    return True


def _length(weight: Weight) -> int:
    return weight.span.end - weight.span.start
