"""New elements without a base, or whose base is of no help (a model trained again).

A payload of `FRESH` is a byte that says how, and a stream. 0: the elements as integers, for floats ordered ones.
1: the bytes of the elements by place, all lowest ones first, as one zstd frame. 2: the elements as one zstd frame.
"""

import numpy as np
from backports import zstd

from common.delta.tensors.block import Bits, Block
from common.delta.tensors.coders import Coder, deflate, inflate
from common.delta.tensors.differences import from_ordered, ordered
from common.delta.tensors.framing import Payload
from common.errors import IntegrityFailure

NUMBERS, PLANES, PLAIN = range(3)
LOOK_LEVEL = 1
LOOK_SHARE = 1.02
"""How near to the best a quick compression must come for a thorough one to be tried."""


def pack_fresh(new: Bits, block: Block, coder: Coder) -> bytes:
    """The smallest form."""
    best = bytes([NUMBERS]) + coder.pack(_numbers(new, block))
    # Repetition is rare among weights and costly to look for, so first a look that costs little.
    for form, data in ((PLANES, _planes(new).tobytes()), (PLAIN, new.tobytes())):
        if len(zstd.compress(data, LOOK_LEVEL)) < LOOK_SHARE * len(best):
            best = min(best, bytes([form]) + deflate(data), key=len)
    return best


def unpack_fresh(payload: bytes, block: Block, coder: Coder) -> Bits:
    reader = Payload(payload)
    form, data = reader.byte(), reader.rest()
    bits = block.dtype.bits
    if form == NUMBERS:
        values = coder.unpack(data, block.count, bits)
        if block.dtype.exponent is None:
            return values
        return from_ordered(values ^ bits.type(1 << (8 * bits.itemsize - 1)), block.dtype)
    if form == PLAIN:
        return np.frombuffer(inflate(data, block.count * bits.itemsize), bits).copy()
    if form == PLANES:
        planes = np.frombuffer(inflate(data, block.count * bits.itemsize), np.uint8).reshape(bits.itemsize, block.count)
        return np.ascontiguousarray(planes.T).view(bits).reshape(-1)
    raise IntegrityFailure("new elements in a payload have an unknown form")


def _numbers(new: Bits, block: Block) -> Bits:
    """Small positive and negative numbers for small floats, whose ordered integers have zero in the middle."""
    if block.dtype.exponent is None:
        return new
    out: Bits = ordered(new, block.dtype) ^ new.dtype.type(1 << (8 * new.itemsize - 1))
    return out


def _planes(new: Bits) -> Bits:
    planes: Bits = np.ascontiguousarray(new.view(np.uint8).reshape(len(new), new.itemsize).T)
    return planes
