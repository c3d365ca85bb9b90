"""Dense differences: every new element against the old one at its place.

Floats (`BUCKETED`): bits become ordered integers, so that neighbours in value are neighbours as integers and a training
step is a small difference. How large depends on the exponent of the old value, which both sides have: elements are
sorted by it (stably, so the order is part of the format) and each run of one exponent is a stream of its own. Exponents
with fewer than `BUCKET_ELEMENTS_MIN` elements share a stream with the next larger ones; what is then left at the top
joins the last stream.

Integers (`DIFFERENCE`): the difference modulo 2^n, as one stream; four-bit ones as two streams, low nibbles first.

A payload of several streams has all but the last as parts, then the last.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from common.delta.tensors.block import Bits, DType
from common.delta.tensors.coders import Coder
from common.delta.tensors.framing import Payload, part

BUCKET_ELEMENTS_MIN = 128
"""Fewer elements do not pay for the model of a stream of their own."""


def pack_differences(old: Bits, new: Bits, dtype: DType, coder: Coder) -> bytes:
    """`new` given `old`: equally long, both of `dtype`."""
    if dtype is DType.I4:
        return _join([coder.pack(_nibble_difference(old, new, shift)) for shift in (0, 4)])
    if dtype.exponent is None:
        return coder.pack(new - old)
    difference = ordered(new, dtype) - ordered(old, dtype)
    order, bounds = buckets(old, dtype)
    difference = difference[order]
    return _join([coder.pack(difference[begin:end]) for begin, end in pairwise(bounds)])


def unpack_differences(old: Bits, data: bytes, dtype: DType, coder: Coder) -> Bits:
    """The inverse of `pack_differences`; IntegrityFailure."""
    count, bits = len(old), dtype.bits
    if dtype is DType.I4:
        low, high = (coder.unpack(stream, count, np.dtype("i1")) for stream in _split(data, 2))
        merged: Bits = ((low.view(bits) + old) & 15) | ((high.view(bits) + (old >> 4)) << 4)
        return merged
    if dtype.exponent is None:
        out: Bits = coder.unpack(data, count, bits) + old
        return out
    order, bounds = buckets(old, dtype)
    new = ordered(old, dtype)
    for stream, begin, end in zip(_split(data, len(bounds) - 1), bounds, bounds[1:], strict=False):
        new[order[begin:end]] += coder.unpack(stream, end - begin, bits)
    return from_ordered(new, dtype)


def ordered(values: Bits, dtype: DType) -> Bits:
    """Unsigned integers in the order of the floats whose bits `values` are; -0 is one below +0."""
    negative = _sign(values)
    out = values.view(f"<i{values.itemsize}") >> (8 * values.itemsize - 1)
    result: Bits = out.view(values.dtype)
    result |= negative
    result ^= values
    return result


def from_ordered(values: Bits, dtype: DType) -> Bits:
    """The inverse of `ordered`."""
    negative = _sign(values)
    out: Bits = (~values).view(f"<i{values.itemsize}") >> (8 * values.itemsize - 1)
    result = out.view(values.dtype)
    result |= negative
    result ^= values
    return result


def buckets(old: Bits, dtype: DType) -> tuple[NDArray[np.intp], list[int]]:
    """The stable order of `old` by exponent, and where in it each bucket begins; the last bound is the end."""
    keys = exponents(old, dtype)
    return np.argsort(keys, kind="stable"), bounds_of(np.bincount(keys), BUCKET_ELEMENTS_MIN)


def exponents(old: Bits, dtype: DType) -> NDArray[np.unsignedinteger]:
    """The exponent fields of floats."""
    width, mantissa = dtype.exponent or (0, 0)
    fields = (old >> old.dtype.type(mantissa)) & old.dtype.type((1 << width) - 1)
    out: NDArray[np.unsignedinteger] = fields.astype(np.uint8 if width <= 8 else np.uint16)
    return out


def bounds_of(counts: NDArray[np.intp], least: int) -> list[int]:
    """Where each bucket of at least `least` elements begins, given how many elements have each exponent; the last bound
    is the end.
    """
    bounds = [0]
    for end in np.cumsum(counts).tolist():
        if end - bounds[-1] >= least:
            bounds.append(end)
    # What is left at the top joins the last bucket; a block with few elements is one bucket.
    return [*bounds[: max(1, len(bounds) - 1)], int(counts.sum())]


def _sign(values: Bits) -> np.unsignedinteger:
    sign: np.unsignedinteger = values.dtype.type(1 << (8 * values.itemsize - 1))
    return sign


def _nibble_difference(old: Bits, new: Bits, shift: int) -> Bits:
    """Modulo 16, from -8 to 7."""
    difference = (new >> np.uint8(shift)) - (old >> np.uint8(shift))
    out: Bits = ((difference + np.uint8(8)) & np.uint8(15)) - np.uint8(8)
    return out


def _join(streams: list[bytes]) -> bytes:
    return b"".join([part(stream) for stream in streams[:-1]]) + streams[-1]


def _split(data: bytes, streams: int) -> list[bytes]:
    reader = Payload(data)
    found = [reader.part() for _ in range(streams - 1)]
    return [*found, reader.rest()]
