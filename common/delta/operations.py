"""What a patch is made of: operations that write the target from its first byte to its last.

A copy takes bytes of the base as they are, an addition changes each by a byte of its own, a literal brings new bytes, a
tensor block brings numbers that `common.delta.tensors` turns into the elements of a tensor, given those of the base.
This module knows what each means in bytes of target and base, not how it is written down (`layout`).
"""

from typing import NamedTuple

from common.delta.tensors import Block, Method


class Copy(NamedTuple):
    """`length` bytes of the base from `offset` on."""

    offset: int
    length: int


class Add(NamedTuple):
    """Bytes of the base from `offset` on, each plus its byte of `differences`, modulo 256."""

    offset: int
    differences: bytes

    @property
    def length(self) -> int:
        return len(self.differences)


class Literal(NamedTuple):
    """Bytes that the base does not have."""

    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)


class TensorBlock(NamedTuple):
    """Elements of a tensor, made by `method` from `payload` and, where `block.old_dtype` is set, from those at `offset`
    in the base.
    """

    offset: int
    block: Block
    method: Method
    payload: bytes

    @property
    def length(self) -> int:
        return self.block.count * self.block.dtype.bits.itemsize


Operation = Copy | Add | Literal | TensorBlock


def old_bytes(block: Block) -> int:
    """How many bytes of the base `block` is made from."""
    return 0 if block.old_dtype is None else block.count * block.old_dtype.bits.itemsize
