"""Guided differences: the gradient of a layer is near a product of two thin matrices, so the signs of a step are too.

A *guide* is such a product, of small integers, sent with the block: U (rows by rank) times V (rank by columns). Its
sign foretells that of an element's difference, and its magnitude, in `LEVELS` levels, how surely, and how large the
difference is. Even Adam, which hides the size of the gradient, is seen through this.

A payload of `GUIDED` begins with the rank and the height of a level (varints). Then come two parts, the streams of U,
column by column, and of V, row by row, and three parts for each bucket of elements by the exponent of the old one: the
streams of the differences' magnitudes at low, middle and high levels. The signs are last, a stream for each level, all
but the last of them as parts: a bit for each difference that is not zero, set where the guide is wrong, eight to a
byte. A guide of zero says "up".

The factors are the largest singular vectors of a matrix of signs, each weighted with the place of the magnitude among
all magnitudes: so neither a few large ones nor the precision of the type count for more than the rest.
"""

from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.delta.tensors.block import Bits, Block, DType
from common.delta.tensors.coders import Coder
from common.delta.tensors.differences import bounds_of, exponents, from_ordered, ordered
from common.delta.tensors.framing import Payload, part
from common.delta.varint import varint
from common.errors import IntegrityFailure

RANK_MAX: Final = 64
"""With factors of signed bytes no product exceeds 2^20."""
STEP_MAX: Final = RANK_MAX << 14
LEVELS: Final = 8
SECOND_THIRD: Final = 2
"""The first level of the second third of a bucket."""
LAST_THIRD: Final = 5
BUCKET_ELEMENTS_MIN: Final = 192
"""Fewer elements do not pay for the models of three streams."""
BLAS_WORK_MAX: Final = 256 * 1024
"""Multiplications in one call of the matrix library, few enough that it starts no threads to share them."""

SAVED_SHARE_MIN: Final = 0.05
"""Of what the differences take: a guide costs a device half as much time again, so it must be worth it."""
SAVED_BITS_MAX: Final = 0.6
"""No guide was seen to save more for each element."""
RANKS: Final = (2, 4, 8, 12, 16, 20)
"""Those that are tried."""
FACTOR_STEPS: Final = 2.0
"""Steps of the factors in the standard deviation of their largest column."""
FACTOR_BITS: Final = 2.2
"""What an element of a factor takes, about."""
OVERSAMPLED: Final = 4
POWER_PASSES: Final = 1
SQUARES_SHARE_MIN: Final = 1e-6
"""Of the largest squared singular value: smaller ones are below the precision of binary32."""
SAMPLE_ELEMENTS: Final = 16 * 1024
"""Elements at which a rank is chosen."""
SAMPLE_ROWS: Final = 16
STEPS_IN_MEAN: Final = 2.5
"""Height of the mean magnitude of a guide, in levels."""
PLACES: Final = 8
"""Magnitudes are told apart by as many quantiles of theirs."""
WEIGHT_MIN: Final = 0.1
"""What the smallest magnitude counts in the fit; the largest counts 1."""

Factor = NDArray[np.float32]


class Guide(NamedTuple):
    """The factors U (rows by rank) and V (rank by columns), both of small integers, and the height of a level."""

    rows: Factor
    columns: Factor
    step: int


class Guidance(NamedTuple):
    """What a guide says of each element: its level, and whether its difference is expected to be negative."""

    level: NDArray[np.uint8]
    down: NDArray[np.bool_]


def pack_guided(old: Bits, new: Bits, block: Block, coder: Coder) -> bytes | None:
    """`new` given `old`; None when no guide pays for itself."""
    if block.dtype.exponent is None or not 1 < block.columns < block.count:
        return None
    difference = ordered(new, block.dtype) - ordered(old, block.dtype)
    down = difference.view(f"<i{old.itemsize}") < 0
    difference = _turned(difference, down)
    saved_min = SAVED_SHARE_MIN * _bits_each(old, difference, block.dtype)
    if saved_min > SAVED_BITS_MAX:
        return None
    guide = _find(_wanted(old, difference, down, block.dtype).reshape(-1, block.columns), saved_min)
    if guide is None:
        return None
    level, expected = _guidance(guide)
    factors = [coder.pack(factor.astype(np.int8).reshape(-1)) for factor in (guide.rows.T, guide.columns)]
    order, bounds = _magnitude_order(old, level, block.dtype)
    magnitudes = difference[order]
    streams = [coder.pack(magnitudes[begin:end]) for begin, end in pairwise(bounds)]
    order, bounds = _sign_order(level, difference)
    wrong = (down ^ expected)[order]
    signs = [coder.pack(np.packbits(wrong[begin:end], bitorder="little")) for begin, end in pairwise(bounds)]
    head = varint(len(guide.columns)) + varint(guide.step)
    return head + b"".join(map(part, [*factors, *streams, *signs[:-1]])) + signs[-1]


def unpack_guided(old: Bits, payload: bytes, block: Block, coder: Coder) -> Bits:
    """The inverse of `pack_guided`; IntegrityFailure."""
    if block.dtype.exponent is None:
        raise IntegrityFailure("a guided payload for elements that are no floats")
    reader = Payload(payload)
    rank, step = reader.number(RANK_MAX), reader.number(STEP_MAX)
    if not rank or not step:
        raise IntegrityFailure("a guided payload without a guide")
    rows = _unpack_factor(reader.part(), rank, block.count // block.columns, coder).T
    level, down = _guidance(Guide(rows, _unpack_factor(reader.part(), rank, block.columns, coder), step))
    difference = np.empty(block.count, old.dtype)
    order, bounds = _magnitude_order(old, level, block.dtype)
    for begin, end in pairwise(bounds):
        difference[order[begin:end]] = coder.unpack(reader.part(), end - begin, old.dtype)
    del order
    order, bounds = _sign_order(level, difference)
    wrong = np.zeros(block.count, np.bool_)
    for index, (begin, end) in enumerate(pairwise(bounds)):
        stream = reader.part() if index < LEVELS - 1 else reader.rest()
        packed = coder.unpack(stream, -(-(end - begin) // 8), np.dtype(np.uint8))
        wrong[order[begin:end]] = np.unpackbits(packed, count=end - begin, bitorder="little")
    del order
    difference = _turned(difference, wrong ^ down)
    difference += ordered(old, block.dtype)
    return from_ordered(difference, block.dtype)


def _turned(values: Bits, down: NDArray[np.bool_]) -> Bits:
    """Values modulo 2^n, negated where `down`."""
    ones = down.astype(values.dtype)
    np.negative(ones, out=ones)
    out: Bits = values + ones
    out ^= ones
    return out


def _unpack_factor(data: bytes, rows: int, columns: int, coder: Coder) -> Factor:
    return coder.unpack(data, rows * columns, np.dtype("i1")).reshape(rows, columns).astype(np.float32)


def _guidance(guide: Guide) -> Guidance:
    rows, columns = len(guide.rows), guide.columns.shape[1]
    found = Guidance(np.empty(rows * columns, np.uint8), np.empty(rows * columns, np.bool_))
    at_once = max(1, BLAS_WORK_MAX // guide.columns.size)
    for begin in range(0, rows, at_once):
        # Sums of integers below 2^24 are exact in binary32, in whatever order a machine adds them.
        product = (guide.rows[begin : begin + at_once] @ guide.columns).reshape(-1)
        chosen = slice(begin * columns, begin * columns + len(product))
        np.less(product, 0, out=found.down[chosen])
        height = np.abs(product, out=product).astype(np.int32)
        found.level[chosen] = np.minimum(height // np.int32(guide.step), LEVELS - 1)
    return found


def _magnitude_order(old: Bits, level: NDArray[np.uint8], dtype: DType) -> tuple[NDArray[np.intp], list[int]]:
    """The stable order by bucket and third, and where in it each stream begins; the last bound is the end."""
    exponent = exponents(old, dtype)
    counts = np.bincount(exponent)
    bounds = bounds_of(counts, BUCKET_ELEMENTS_MIN)
    streams = 3 * (len(bounds) - 1)
    first = 3 * np.searchsorted(bounds[1:], np.cumsum(counts))
    keys = first.astype(np.uint8 if streams <= 256 else np.uint16)[exponent]
    keys += level >= SECOND_THIRD
    keys += level >= LAST_THIRD
    ends = np.cumsum(np.bincount(keys, minlength=streams)).tolist()
    return np.argsort(keys, kind="stable"), [0, *ends]


def _sign_order(level: NDArray[np.uint8], difference: Bits) -> tuple[NDArray[np.intp], list[int]]:
    """The stable order by level of what moved, and where in it each level begins; the last bound is the end."""
    keys = np.where(difference != 0, level, np.uint8(LEVELS))
    ends = np.cumsum(np.bincount(keys, minlength=LEVELS)[:LEVELS]).tolist()
    return np.argsort(keys, kind="stable")[: ends[-1]], [0, *ends]


def _wanted(old: Bits, magnitude: Bits, down: NDArray[np.bool_], dtype: DType) -> NDArray[np.float32]:
    """What a guide should be like: the sign of each difference times its place among all, 0 where nothing moved."""
    exponent = exponents(old, dtype)
    steps = np.ldexp(np.float32(1), np.arange(int(exponent.max()) + 1) - int(exponent.max()))
    moved = magnitude.astype(np.float32) * steps[exponent]
    place = np.zeros(len(moved), np.uint8)
    for least in np.quantile(moved[:: 1 + len(moved) // SAMPLE_ELEMENTS], np.arange(1, PLACES) / PLACES):
        place += moved >= np.float32(least)
    weights = np.linspace(WEIGHT_MIN, 1, PLACES, dtype=np.float32)
    out: NDArray[np.float32] = weights[place]
    out *= magnitude != 0
    out *= np.float32(1) - np.float32(2) * down
    return out


def _bits_each(old: Bits, magnitude: Bits, dtype: DType) -> float:
    """About how many bits a difference takes without a guide: the sign, and where in its bucket the magnitude is."""
    some = slice(None, None, max(1, len(old) // SAMPLE_ELEMENTS))
    exponent = exponents(old[some], dtype)
    low, high = np.percentile(magnitude[some][exponent == np.bincount(exponent).argmax()], (25, 75))
    return 2 + float(np.log2(1 + high - low))


def _find(wanted: NDArray[np.float32], saved_min: float) -> Guide | None:
    """The guide whose rank saves most, as a sample of the rows shows it; None where none saves `saved_min` bits for
    each element that moved.
    """
    most = min(RANKS[-1], *wanted.shape)
    u, v = _factors(wanted, most)
    some = slice(None, None, max(1, wanted.size // SAMPLE_ELEMENTS))
    signs = wanted[some].reshape(-1)
    scale = wanted.size / len(signs)
    found, least = None, float(np.count_nonzero(signs)) * scale * (1 - saved_min)
    for rank in [rank for rank in RANKS if rank <= most]:
        guide = _quantised(u[:, :rank], v[:rank])
        cost = _sign_bits(signs, _guidance(guide._replace(rows=guide.rows[some]))) * scale
        cost += rank * sum(wanted.shape) * FACTOR_BITS
        if cost < least:
            found, least = guide, cost
    return found


def _factors(matrix: Factor, rank: int) -> tuple[Factor, Factor]:
    """The largest `rank` singular pairs, about, their values shared between both sides."""
    width = min(rank + OVERSAMPLED, *matrix.shape)
    start = np.cos(np.outer(np.arange(matrix.shape[1]) + 1.0, np.arange(width) + 1.0) ** 2).astype(np.float32)
    basis, _ = _orthogonal(_times(matrix, start))
    for _ in range(POWER_PASSES):
        basis, _ = _orthogonal(_times(matrix, _times_transposed(matrix, basis)))
    other = _times_transposed(matrix, basis)
    v, (values, turn) = _orthogonal(other)
    root = np.sqrt(values[:rank])
    return _times(basis, turn[:, :rank] * root), np.ascontiguousarray((v[:, :rank] * root).T)


def _orthogonal(thin: Factor) -> tuple[Factor, tuple[Factor, Factor]]:
    """The singular vectors of a thin matrix on its long side; its singular values, largest first, and the other
    vectors. By way of its small square, which is no work for several threads.
    """
    squares, vectors = np.linalg.eigh(_times_transposed(thin, thin).astype(np.float64))
    squares, vectors = squares[::-1], vectors[:, ::-1]
    values = np.sqrt(np.maximum(squares, max(float(squares[0]) * SQUARES_SHARE_MIN, float(np.finfo(np.float32).tiny))))
    turn = vectors.astype(np.float32)
    return _times(thin, (vectors / values).astype(np.float32)), (values.astype(np.float32), turn)


def _times(matrix: Factor, thin: Factor) -> Factor:
    at_once = max(1, BLAS_WORK_MAX // thin.size)
    return np.concatenate([matrix[begin : begin + at_once] @ thin for begin in range(0, len(matrix), at_once)])


def _times_transposed(matrix: Factor, thin: Factor) -> Factor:
    at_once = max(1, BLAS_WORK_MAX // (matrix.shape[1] * thin.shape[1]))
    out = np.zeros((matrix.shape[1], thin.shape[1]), np.float32)
    for begin in range(0, len(matrix), at_once):
        out += matrix[begin : begin + at_once].T @ thin[begin : begin + at_once]
    return out


def _quantised(u: Factor, v: Factor) -> Guide:
    rows, columns = (
        np.clip(np.rint(factor * np.float32(FACTOR_STEPS / max(spread, 1e-30))), -127, 127)
        for factor, spread in ((u, float(u.std(axis=0).max())), (v, float(v.std(axis=1).max())))
    )
    some = np.abs(_times(rows[:: max(1, len(rows) // SAMPLE_ROWS)], columns))
    return Guide(rows, columns, max(1, round(float(some.mean()) / STEPS_IN_MEAN)))


def _sign_bits(signs: NDArray[np.float32], guidance: Guidance) -> float:
    """What the signs of elements that moved take, at least."""
    moved = signs != 0
    wrong = (signs < 0) ^ guidance.down
    counts = np.bincount((guidance.level * np.uint8(2) + wrong)[moved], minlength=2 * LEVELS).reshape(LEVELS, 2)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    return -float((counts * np.log2(np.where(shares, shares, 1))).sum())
