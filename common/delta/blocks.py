"""From a pair of tensors to operations: blocks small enough for a device, each written the shortest way there is.

A block is a run of whole rows where rows fit into one, else any run of elements. Blocks that did not change become
copies, and those that no method makes shorter than they are become literals.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from common.artifact.protobuf import Span
from common.artifact.source import ByteSource
from common.artifact.weights import ELEMENT_BITS, Weight
from common.delta.operations import Copy, Literal, Operation, TensorBlock, old_bytes
from common.delta.pairing import Pair
from common.delta.tensors import (
    BLOCK_BYTES_MAX,
    ELEMENTS_MAX,
    Block,
    Coder,
    DType,
    Method,
    Plan,
    best,
    pack_low_rank,
    plan_low_rank,
)

BLOCKS_AT_ONCE = 16
"""Blocks that are worked on at a time; each takes about 20 MB."""
FRESH_BYTES_MIN = 256
"""A shorter run of new elements is written as a literal."""
PLANNED_ELEMENTS_MAX = 4 * 1024 * 1024
"""Of a matrix that is searched for a low rank; that takes up to 40 bytes for each."""
GUIDED_SHARE_MIN = 1 / 4
"""Of the blocks worked on at a time; with fewer of them guided, no guides are looked for in those that follow."""

T = TypeVar("T")
R = TypeVar("R")


class Each(Protocol):
    """Like `map` with one iterable: results in order, computed one by one or several at once."""

    def __call__(self, function: Callable[[T], R], values: Iterable[T], /) -> Iterable[R]: ...


class _Task(NamedTuple):
    """Block `block` of the target at `start`, to be made from the base at `offset`."""

    start: int
    offset: int
    block: Block
    row: int = 0
    """Of the tensor, with which the block begins."""
    plan: Plan | None = None
    guides: bool = True
    """Whether to look for one."""


class Encoder(NamedTuple):
    """Turns tensors of `target` into operations on `base`; `each` is how several blocks are worked on."""

    base: ByteSource
    target: ByteSource
    coder: Coder
    each: Each

    def tensor(self, pair: Pair) -> Iterator[Operation]:
        """What writes the tensor `pair.new`, which has a partner in the base."""
        new, old = pair.new, pair.old
        if old is None:
            raise ValueError(f"{new.name!r} has no partner")
        if pair.same:
            yield Copy(old.span.start, new.span.end - new.span.start)
            return
        shared, elements = _elements(new.kind, min(_count(old), _count(new))), _elements(new.kind, _count(new))
        tasks = list(_tasks(new, DType[old.kind], new.span.start, old.span.start, shared))
        plan = _plan(new, old, self.base, self.target)
        found = self._encoded(tasks)
        if plan is not None:
            planned = list(self._encoded([task._replace(plan=plan) for task in tasks]))
            plain = list(found)
            found = iter(planned if _written_bytes(planned) < _written_bytes(plain) else plain)
        yield from found
        begin = new.span.start + shared * DType[new.kind].bits.itemsize
        yield from self._encoded(list(_tasks(new, None, begin, 0, elements - shared)))

    def fresh(self, weight: Weight, span: Span) -> Iterator[Operation]:
        """What writes the bytes `span` of the target, which lie in the tensor `weight`, without the base."""
        item = DType[weight.kind].bits.itemsize
        first = weight.span.start + -(-(span.start - weight.span.start) // item) * item
        count = (span.end - first) // item
        if count * item < FRESH_BYTES_MIN:
            yield Literal(self.target.read_at(span.start, span.end - span.start))
            return
        last = first + count * item
        if first > span.start:
            yield Literal(self.target.read_at(span.start, first - span.start))
        yield from self._encoded(list(_tasks(weight, None, first, 0, count)))
        if last < span.end:
            yield Literal(self.target.read_at(last, span.end - last))

    def _encoded(self, tasks: list[_Task]) -> Iterator[Operation]:
        waiting, guides = iter(tasks), True
        while batch := [task._replace(guides=guides) for task in islice(waiting, BLOCKS_AT_ONCE)]:
            found = list(self.each(self._operation, batch))
            yield from found
            # The blocks of one tensor are alike: where a guide pays in few of so many, looking on is in vain.
            guided = sum(
                isinstance(operation, TensorBlock) and operation.method is Method.GUIDED for operation in found
            )
            guides = guides and guided >= GUIDED_SHARE_MIN * len(found)

    def _operation(self, task: _Task) -> Operation:
        offset, block = task.offset, task.block
        new = self.target.read_at(task.start, block.count * block.dtype.bits.itemsize)
        old = self.base.read_at(offset, old_bytes(block))
        wanted = np.frombuffer(new, block.dtype.bits)
        elements = None if block.old_dtype is None else np.frombuffer(old, block.old_dtype.bits)
        if task.plan is not None and elements is not None:
            payload = pack_low_rank(task.plan, task.row, elements, wanted, block, self.coder)
            return TensorBlock(offset, block, Method.LOW_RANK, payload)
        if old == new:
            return Copy(offset, len(new))
        found = best(elements, wanted, block, self.coder, guides=task.guides)
        if found is None:
            return Literal(new)
        method, payload = found
        if method == Method.FRESH:
            block = block._replace(old_dtype=None)
        return TensorBlock(offset, block, method, payload)


def _written_bytes(operations: list[Operation]) -> int:
    """About how much of a patch `operations` take."""
    return sum(
        len(operation.payload) if isinstance(operation, TensorBlock) else operation.length
        for operation in operations
        if not isinstance(operation, Copy)
    )


def _plan(new: Weight, old: Weight, base: ByteSource, target: ByteSource) -> Plan | None:
    """Whether the difference of two matrices is a product of two thin ones, and of which. A convolution is a matrix
    with a row for each output channel.
    """
    if len(new.shape) < 2 or (old.kind, old.shape) != (new.kind, new.shape):
        return None
    columns = math.prod(new.shape[1:])
    if math.prod(new.shape) > PLANNED_ELEMENTS_MAX or columns != _columns(new, ELEMENTS_MAX):
        return None
    before, after = (
        np.frombuffer(source.read_at(span.start, span.end - span.start), DType[new.kind].bits).reshape(-1, columns)
        for source, span in ((base, old.span), (target, new.span))
    )
    return plan_low_rank(before, after, DType[new.kind])


def _tasks(weight: Weight, old_dtype: DType | None, start: int, offset: int, elements: int) -> Iterator[_Task]:
    """Blocks for `elements` of `weight`, which begin at `start` of the target and `offset` of the base."""
    dtype = DType[weight.kind]
    most = min(ELEMENTS_MAX, BLOCK_BYTES_MAX // dtype.bits.itemsize)
    columns = _columns(weight, most)
    step = most - most % columns if columns > 1 else most
    done = 0
    while done < elements:
        count = min(step, elements - done)
        block = Block(dtype, old_dtype, count, columns if columns > 1 and count % columns == 0 else count)
        yield _Task(start, offset, block, done // columns)
        start += count * dtype.bits.itemsize
        offset += old_bytes(block)
        done += count


def _columns(weight: Weight, most: int) -> int:
    """Elements in a row: all that one entry of the first axis holds, or one of the last if that is too long."""
    if len(weight.shape) < 2:
        return 1
    for columns in (math.prod(weight.shape[1:]), weight.shape[-1]):
        if 0 < columns <= most and (weight.kind != "I4" or columns % 2 == 0):
            return _elements(weight.kind, columns)
    return 1


def _count(weight: Weight) -> int:
    return (weight.span.end - weight.span.start) * 8 // ELEMENT_BITS[weight.kind]


def _elements(kind: str, count: int) -> int:
    """Entries of the array in which `count` elements travel: two 4-bit ones share a byte."""
    return (count + 1) // 2 if kind == "I4" else count
