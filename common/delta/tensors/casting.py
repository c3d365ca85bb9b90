"""The old elements in another type: a float type in another one, or float32 quantised to eight bits.

A payload of `CAST` is a byte `form`, what the form needs, the number of a method and that method's payload, which says
what the prediction missed: `SPARSE`, or the dense method of the new type, against the predicted elements.

Form 0 is another float type, rounded to nearest, ties to even. The others quantise in float32:
q = clip(rint(x / scale) + zero). Form 1 has one scale for the block, 2 one for each row, 3 one for each column; 4 one
for each row that is the largest magnitude of the row divided by 127. They go on with a byte, 0 for q from -128 to 127
or 1 for q from 0 to 255, and the zero point, a byte. Then 1 to 3 have a part with the bits of their scales as integers.
Division, rounding and clipping are defined to the bit (IEEE 754); what is not finite counts as zero.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.delta.tensors.block import Bits, Block, DType, Method
from common.delta.tensors.coders import Coder
from common.delta.tensors.conversion import convert
from common.delta.tensors.differences import pack_differences, unpack_differences
from common.delta.tensors.framing import Payload, part
from common.delta.tensors.selections import pack_sparse, unpack_sparse
from common.errors import IntegrityFailure

FLOAT, BLOCK_SCALE, ROW_SCALES, COLUMN_SCALES, ROW_MAXIMA = range(5)
ENOUGH_BYTES = 32
"""A payload this short ends the search."""

Floats = NDArray[np.float32]


class _Grid(NamedTuple):
    """How float32 becomes eight bits: scales in a shape that fits the block's, whether unsigned, the zero point."""

    scales: Floats
    unsigned: int
    zero: int


def pack_cast(old: Bits, new: Bits, block: Block, coder: Coder) -> bytes | None:
    """None for types that nobody converts between and where no grid comes near."""
    if block.old_dtype is None:
        return None
    converted = convert(old, block.old_dtype, block.dtype)
    if converted is not None:
        return bytes([FLOAT]) + _pack_missed(converted, new, block, coder)
    if (block.old_dtype, block.dtype) != (DType.F32, DType.I8):
        return None
    numbers = _numbers(old, block)
    candidates = []
    for unsigned in (0, 1):
        integers = new.view("u1" if unsigned else "i1").reshape(numbers.shape).astype(np.float32)
        zero = _zero(numbers, integers, unsigned)
        for form in (ROW_MAXIMA, BLOCK_SCALE, ROW_SCALES, COLUMN_SCALES):
            grid = _Grid(_scales(form, numbers, integers - np.float32(zero)), unsigned, zero)
            predicted = _quantised(numbers, grid)
            share = np.count_nonzero(predicted != new) / len(new)
            if share < 0.5:
                head = bytes([form, unsigned, zero & 255])
                scales = b"" if form == ROW_MAXIMA else part(coder.pack(grid.scales.reshape(-1).view("<u4")))
                candidates.append(head + scales + _pack_missed(predicted, new, block, coder))
            if not share and len(candidates[-1]) < ENOUGH_BYTES:
                return candidates[-1]
    return min(candidates, key=len, default=None)


def unpack_cast(old: Bits, payload: bytes, block: Block, coder: Coder) -> Bits:
    reader = Payload(payload)
    form = reader.byte()
    predicted = None
    if form == FLOAT and block.old_dtype is not None:
        predicted = convert(old, block.old_dtype, block.dtype)
    elif BLOCK_SCALE <= form <= ROW_MAXIMA and (block.old_dtype, block.dtype) == (DType.F32, DType.I8):
        numbers = _numbers(old, block)
        predicted = _quantised(numbers, _read_grid(reader, form, numbers, coder))
    if predicted is None:
        raise IntegrityFailure("a cast in a payload does not fit the types of its block")
    return _unpack_missed(predicted, reader, block, coder)


def _read_grid(reader: Payload, form: int, numbers: Floats, coder: Coder) -> _Grid:
    unsigned, zero = reader.byte(), reader.byte()
    if unsigned > 1:
        raise IntegrityFailure("a cast in a payload has unknown flags")
    if not unsigned and zero > 127:
        zero -= 256
    if form == ROW_MAXIMA:
        return _Grid(_scales(form, numbers, numbers), unsigned, zero)
    shape = _scale_shape(form, numbers)
    scales = coder.unpack(reader.part(), shape[0] * shape[1], np.dtype("<u4")).view("<f4").reshape(shape)
    return _Grid(scales, unsigned, zero)


def _pack_missed(predicted: Bits, new: Bits, block: Block, coder: Coder) -> bytes:
    dense = Method.DIFFERENCE if block.dtype.exponent is None else Method.BUCKETED
    sparse = bytes([Method.SPARSE]) + pack_sparse(predicted, new, block, coder)
    if np.count_nonzero(predicted != new) * 16 < len(new):
        return sparse
    return min(sparse, bytes([dense]) + pack_differences(predicted, new, block.dtype, coder), key=len)


def _unpack_missed(predicted: Bits, reader: Payload, block: Block, coder: Coder) -> Bits:
    method, payload = reader.byte(), reader.rest()
    if method == Method.SPARSE:
        return unpack_sparse(predicted, payload, block, coder)
    if method == (Method.DIFFERENCE if block.dtype.exponent is None else Method.BUCKETED):
        return unpack_differences(predicted, payload, block.dtype, coder)
    raise IntegrityFailure("a cast in a payload corrects itself in an unknown way")


def _numbers(old: Bits, block: Block) -> Floats:
    numbers = old.view("<f4").reshape(-1, block.columns)
    return np.where(np.isfinite(numbers), numbers, np.float32(0))


def _quantised(numbers: Floats, grid: _Grid) -> Bits:
    low, high = (0, 255) if grid.unsigned else (-128, 127)
    with np.errstate(all="ignore"):
        places = np.rint(numbers / grid.scales)
    places = np.clip(np.where(np.isnan(places), np.float32(0), places) + np.float32(grid.zero), low, high)
    return places.astype("<i2").astype("<u1").reshape(-1)


def _scale_shape(form: int, numbers: Floats) -> tuple[int, int]:
    rows, columns = numbers.shape
    return {BLOCK_SCALE: (1, 1), ROW_SCALES: (rows, 1), COLUMN_SCALES: (1, columns)}[form]


def _scales(form: int, numbers: Floats, places: Floats) -> Floats:
    """Scales that put as many numbers as possible on their places (q minus the zero point)."""
    if form == ROW_MAXIMA:
        maxima: Floats = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
        return maxima
    axes = {BLOCK_SCALE: (0, 1), ROW_SCALES: (1,), COLUMN_SCALES: (0,)}[form]
    agree = np.signbit(numbers) == np.signbit(places)
    inside = (np.abs(places) >= 1) & (np.abs(places) < np.abs(places).max(initial=0)) & agree & (numbers != 0)
    with np.errstate(all="ignore"):
        size, ratio = np.abs(places).astype(np.float64), np.abs(numbers).astype(np.float64)
        least = np.where(inside, ratio / (size + 0.5), 0).max(axis=axes, keepdims=True)
        most = np.where(inside, ratio / (size - 0.5), np.inf).min(axis=axes, keepdims=True)
        # Where nothing tells, the range of the numbers does.
        guess = np.abs(numbers).max(axis=axes, keepdims=True) / 127.0
        found: Floats = np.where(np.isfinite(most) & (least > 0), (least + most) / 2, guess).astype(np.float32)
        return found


def _zero(numbers: Floats, integers: Floats, unsigned: int) -> int:
    """The zero point, by a line through all pairs; symmetric signed grids have zero."""
    x, y = numbers - numbers.mean(dtype=np.float64), integers - integers.mean(dtype=np.float64)
    spread = float((x**2).sum())
    if not spread:
        return 0
    zero = float(integers.mean()) - float((x * y).sum()) / spread * float(numbers.mean(dtype=np.float64))
    return round(min(max(zero, 0), 255) if unsigned else min(max(zero, -128), 127))
