"""Where a block changed: methods that name the changed elements and leave the others as they are.

`SPARSE`: how many elements changed (varint), their places as a part with the gaps between them (each place minus the
one before, minus one) and dense differences of these elements. `ROWS`: which rows changed, as a bit field, and dense
differences of those rows. A bit field is a part: one bit per entry, the first in the lowest bit of the first byte, as
it is when it has the length of that many bits, else as a zstd frame.

`MASK`: new elements are zero where a mask says so and else the old ones. First a byte of flags: 1 zeros keep the sign
of the old value (a weight multiplied by a mask does); 2 the mask is a bit field, which follows; otherwise a varint
follows, and the mask is true where the old value's magnitude (its bits without the sign) is below it.
"""

import numpy as np
from numpy.typing import NDArray

from common.delta.tensors.block import Bits, Block, DType
from common.delta.tensors.coders import Coder, deflate, inflate
from common.delta.tensors.differences import pack_differences, unpack_differences
from common.delta.tensors.framing import Payload, part
from common.delta.varint import varint
from common.errors import IntegrityFailure

SIGNED_ZEROS, BIT_FIELD = 1, 2

Flags = NDArray[np.bool_]


def pack_sparse(old: Bits, new: Bits, block: Block, coder: Coder) -> bytes:
    places = np.flatnonzero(old != new)
    gaps = np.diff(places, prepend=-1) - 1
    head = varint(len(places)) + part(coder.pack(gaps))
    return head + pack_differences(old[places], new[places], block.dtype, coder)


def unpack_sparse(old: Bits, payload: bytes, block: Block, coder: Coder) -> Bits:
    reader = Payload(payload)
    count = reader.number(block.count)
    gaps = coder.unpack(reader.part(), count, np.dtype("<i8"))
    if count and (int(gaps.min()) < 0 or int(gaps.max()) >= block.count or int(gaps.sum()) + count > block.count):
        raise IntegrityFailure("a payload changes elements outside its block")
    places = np.cumsum(gaps + 1) - 1
    new = old.copy()
    new[places] = unpack_differences(old[places], reader.rest(), block.dtype, coder)
    return new


def pack_rows(old: Bits, new: Bits, block: Block, coder: Coder) -> bytes:
    changed = (old != new).reshape(-1, block.columns).any(axis=1)
    chosen = np.repeat(changed, block.columns)
    return part(_pack_flags(changed)) + pack_differences(old[chosen], new[chosen], block.dtype, coder)


def unpack_rows(old: Bits, payload: bytes, block: Block, coder: Coder) -> Bits:
    reader = Payload(payload)
    changed = _unpack_flags(reader.part(), block.count // block.columns)
    chosen = np.repeat(changed, block.columns)
    new = old.copy()
    new[chosen] = unpack_differences(old[chosen], reader.rest(), block.dtype, coder)
    return new


def pack_mask(old: Bits, new: Bits, block: Block, _coder: Coder) -> bytes | None:
    """None when the new elements are something else than old ones and zeros."""
    for flags in (0, SIGNED_ZEROS):
        zeros = _zeros(old, block.dtype, flags)
        mask = (new == zeros) & (old != zeros)
        if not bool(((new == old) | mask).all()):
            continue
        magnitudes = _magnitudes(old, block.dtype)
        threshold = int(magnitudes[mask].max(initial=0)) + 1
        if bool((new == np.where(magnitudes < threshold, zeros, old)).all()):
            return bytes([flags]) + varint(threshold)
        return bytes([flags | BIT_FIELD]) + part(_pack_flags(mask))
    return None


def unpack_mask(old: Bits, payload: bytes, block: Block, _coder: Coder) -> Bits:
    reader = Payload(payload)
    flags = reader.byte()
    if flags > SIGNED_ZEROS | BIT_FIELD:
        raise IntegrityFailure("a mask in a payload has unknown flags")
    if flags & BIT_FIELD:
        mask = _unpack_flags(reader.part(), block.count)
    else:
        magnitudes = _magnitudes(old, block.dtype)
        mask = magnitudes < magnitudes.dtype.type(reader.number(int(np.iinfo(magnitudes.dtype).max)))
    reader.end()
    return np.where(mask, _zeros(old, block.dtype, flags & SIGNED_ZEROS), old)


def _zeros(old: Bits, dtype: DType, flags: int) -> Bits:
    sign = _sign(dtype) if flags & SIGNED_ZEROS else old.dtype.type(0)
    zeros: Bits = old & sign
    return zeros


def _magnitudes(old: Bits, dtype: DType) -> Bits:
    """Floats without their sign; integers as two's complement numbers without theirs."""
    if dtype.exponent is not None:
        out: Bits = old & ~_sign(dtype)
        return out
    signed = old.view(f"<i{old.itemsize}")
    magnitudes: Bits = np.where(signed < 0, -signed, signed).view(old.dtype)
    return magnitudes


def _sign(dtype: DType) -> np.unsignedinteger:
    """The sign bit of a float; integers have no -0."""
    sign: np.unsignedinteger = dtype.bits.type(0 if dtype.exponent is None else 1 << (8 * dtype.bits.itemsize - 1))
    return sign


def _pack_flags(flags: Flags) -> bytes:
    plain = np.packbits(flags, bitorder="little").tobytes()
    return min(plain, deflate(plain), key=len)


def _unpack_flags(data: bytes, count: int) -> Flags:
    length = -(-count // 8)
    plain = data if len(data) == length else inflate(data, length)
    return np.unpackbits(np.frombuffer(plain, np.uint8), count=count, bitorder="little").astype(np.bool_)
