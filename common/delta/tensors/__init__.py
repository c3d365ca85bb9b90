"""Tensor elements as payloads: the numeric kernels of a patch.

`best` turns the old and the new elements of a block into the smallest payload it finds, `decode` turns it back, bit for
bit. A payload is decoded from a stranger's bytes: every failure is an `IntegrityFailure`, and nothing is allocated that
the geometry of the block does not bound. Arithmetic is on integers throughout, so every machine computes the same.
"""

from common.delta.tensors.block import BLOCK_BYTES_MAX, ELEMENTS_MAX, NO_BASE, Block, DType, Method
from common.delta.tensors.choosing import Memory, best, decode, encode
from common.delta.tensors.coders import PCO, ZSTD, Coder
from common.delta.tensors.low_rank import Plan, pack_low_rank, plan_low_rank

__all__ = [
    "BLOCK_BYTES_MAX",
    "ELEMENTS_MAX",
    "NO_BASE",
    "PCO",
    "ZSTD",
    "Block",
    "Coder",
    "DType",
    "Memory",
    "Method",
    "Plan",
    "best",
    "decode",
    "encode",
    "pack_low_rank",
    "plan_low_rank",
]
