"""Low rank: the difference of a matrix is about a product of two thin ones, as a merged adapter (LoRA) leaves it.

`plan_low_rank` finds integers U (rows by rank) and V (rank by columns) and a shift, so that old + U V 2^-shift, rounded
to the type, is nearly the new matrix; what is left are dense differences against that prediction. The product is
computed on integers modulo 2^64, then there is one float64 multiplication by a power of two, one addition and one
rounding per element, which IEEE 754 defines to the bit: no matrix library and no fused operation can make a device see
other numbers.

A payload of `LOW_RANK` begins with the rank, a varint; 0 means that V, rank and shift are those of the payload before.
Otherwise the shift follows (varint) and a part with V, row by row. Then come a part with the block's rows of U, column
by column, and the differences, in which the prediction plays the old elements.

The factors are fitted with weights: an element near zero has a finer grid than one near one, so it tells more. (LoRA:
Hu et al., 2022; the randomised decomposition: Halko, Martinsson, Tropp, 2011; weighted low rank: Srebro, Jaakkola,
2003.)
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.delta.tensors.block import ELEMENTS_MAX, Bits, Block, DType
from common.delta.tensors.coders import Coder
from common.delta.tensors.conversion import as_float64, rounded
from common.delta.tensors.differences import ordered, pack_differences, unpack_differences
from common.delta.tensors.framing import Payload, part
from common.delta.varint import varint
from common.errors import IntegrityFailure

RANK_MAX = 256
FACTOR_ELEMENTS_MAX = ELEMENTS_MAX
"""Elements of V, which a device keeps (8 bytes each)."""
RANK_SHARE_MAX = 1 / 6
"""Of the shorter side: a higher rank costs as much as the differences it explains."""
SHIFT_MAX = 200
SAMPLE_SIDE = 96
"""Rows and columns (at most twice as many) of the sample in which a rank is looked for; it shows ranks up to 2/3."""
SAMPLE_ELEMENTS_MIN = 16 * 1024
"""Smaller matrices are not worth a plan."""
SAVED_BITS_MIN = 1.0
"""Per element; a plan costs time and must be worth it."""
SAMPLE_ELEMENTS = 64 * 1024
"""Elements at which the width of the factors is chosen."""
OVERSAMPLED = 8
ELEMENTS_AT_ONCE = 32 * 1024
"""Elements predicted at a time, to keep what lies between in the cache and out of the memory."""
FIT_WORK_MAX = 2e10
"""Multiplications that a pass of the weighted fit may take."""
FIT_PASSES = 4
FACTOR_BITS = (14, 17, 20, 22, 24, 26)
"""Widths tried for the elements of the factors; twice that and the rank's bits stay below 63."""

Matrix = NDArray[np.float64]
Factor = NDArray[np.int64]


class Plan(NamedTuple):
    """The factors of a whole matrix: `rows` (U) and `columns` (V), and the shift of their product."""

    rows: Factor
    columns: Factor
    shift: int


class Known(NamedTuple):
    """What the first block of a matrix leaves for the others."""

    columns: Factor
    shift: int


def plan_low_rank(old: Bits, new: Bits, dtype: DType) -> Plan | None:
    """Factors for a matrix of at most 64 Mi elements, both as two-dimensional bits; None where they would not pay."""
    if dtype.exponent is None or old.size < SAMPLE_ELEMENTS_MIN:
        return None
    rank = _rank(old, new, dtype)
    if not rank or rank * old.shape[1] > FACTOR_ELEMENTS_MAX:
        return None
    before, after = as_float64(old.reshape(-1), dtype), as_float64(new.reshape(-1), dtype)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return None
    difference = (after - before).reshape(old.shape)
    # An adapter's product was itself rounded before it was added.
    floor = float(np.abs(difference).mean()) * 2.0 ** -(dtype.exponent[1] + 1)
    weights = (1.0 / (_steps(after, dtype) ** 2 + floor**2)).reshape(old.shape)
    u, v = _factors(difference, rank)
    weighted = old.size * rank**2 <= FIT_WORK_MAX
    for _ in range(FIT_PASSES if weighted else 0):
        v = _fit(difference.T, weights.T, u).T
        u, v = _balanced(_fit(difference, weights, v.T), v)
    rows = slice(None, None, max(1, old.size // SAMPLE_ELEMENTS))

    def quantised(bits: int, rows: slice) -> Plan:
        scales = [bits - int(np.ceil(np.log2(np.abs(factor).max()))) for factor in (u, v)]
        columns = np.rint(np.ldexp(v, scales[1]))
        # U makes up for what rounding did to V, as far as it can.
        fitted = _fit(difference[rows], weights[rows], np.ldexp(columns, -scales[1]).T) if weighted else u[rows]
        return Plan(np.rint(np.ldexp(fitted, scales[0])).astype(np.int64), columns.astype(np.int64), sum(scales))

    def cost(bits: int) -> float:
        plan, some_old, some_new = quantised(bits, rows), old[rows], new[rows]
        predicted = _predicted(some_old.reshape(-1), plan.rows, Known(plan.columns, plan.shift), dtype)
        moved = np.abs((ordered(some_new.reshape(-1), dtype) - ordered(predicted, dtype)).view(f"<i{old.itemsize}"))
        return float(np.log2(moved + 1.0).mean()) * old.size + rank * sum(old.shape) * bits

    return quantised(min(FACTOR_BITS, key=cost), slice(None))


def pack_low_rank(  # noqa: PLR0917 - like `decode`
    plan: Plan, begin: int, old: Bits, new: Bits, block: Block, coder: Coder
) -> bytes:
    """The payload of the block that starts with row `begin` of the planned matrix; that of row 0 brings V."""
    u = plan.rows[begin : begin + block.count // block.columns]
    head = varint(0)
    if begin == 0:
        head = varint(len(plan.columns)) + varint(plan.shift) + part(coder.pack(plan.columns.reshape(-1)))
    factor = part(coder.pack(np.ascontiguousarray(u.T).reshape(-1)))
    predicted = _predicted(old, u, Known(plan.columns, plan.shift), block.dtype)
    return head + factor + pack_differences(predicted, new, block.dtype, coder)


def unpack_low_rank(old: Bits, payload: bytes, block: Block, coder: Coder, known: Known | None) -> tuple[Bits, Known]:
    """The new elements, and what the blocks after this one may need."""
    if block.dtype.exponent is None:
        raise IntegrityFailure("a low rank payload for elements that are no floats")
    reader = Payload(payload)
    rank = reader.number(RANK_MAX)
    if rank:
        shift = reader.number(SHIFT_MAX)
        if rank * block.columns > FACTOR_ELEMENTS_MAX:
            raise IntegrityFailure("a factor in a payload exceeds the limits of the format")
        known = Known(_unpack_factor(reader.part(), rank, block.columns, coder), shift)
    if known is None or known.columns.shape[1] != block.columns:
        raise IntegrityFailure("a payload needs a factor that no payload before it has brought")
    rows = block.count // block.columns
    u = _unpack_factor(reader.part(), len(known.columns), rows, coder).T
    predicted = _predicted(old, u, known, block.dtype)
    return unpack_differences(predicted, reader.rest(), block.dtype, coder), known


def _unpack_factor(data: bytes, rows: int, columns: int, coder: Coder) -> Factor:
    return coder.unpack(data, rows * columns, np.dtype("<i8")).reshape(rows, columns)


def _predicted(old: Bits, u: Factor, known: Known, dtype: DType) -> Bits:
    columns = known.columns.shape[1]
    out, matrix = np.empty((len(u), columns), old.dtype), old.reshape(len(u), columns)
    rows = max(1, ELEMENTS_AT_ONCE // columns)
    for begin in range(0, len(u), rows):
        chosen = slice(begin, begin + rows)
        out[chosen] = _predicted_rows(matrix[chosen], u[chosen], known, dtype)
    return out.reshape(-1)


def _predicted_rows(old: Bits, u: Factor, known: Known, dtype: DType) -> Bits:
    product = np.zeros(old.shape, np.int64)
    term = np.empty_like(product)
    for column, row in zip(u.T, known.columns, strict=True):
        product += np.multiply(column[:, np.newaxis], row, out=term)
    numbers = as_float64(old, dtype)
    with np.errstate(all="ignore"):
        moved = numbers + product.astype(np.float64) * 2.0**-known.shift
    # What a NaN becomes is the one thing that IEEE 754 leaves to the machine.
    return np.where(np.isfinite(numbers), rounded(moved, dtype), old)


def _rank(old: Bits, new: Bits, dtype: DType) -> int:
    """The rank that saves most, as far as samples of rows and columns show it; 0 when none saves enough."""
    chosen = tuple(slice(None, None, max(1, length // SAMPLE_SIDE)) for length in old.shape)
    few_old, few_new = (np.ascontiguousarray(bits[chosen]) for bits in (old, new))
    if 2 * np.count_nonzero(few_old != few_new) < few_old.size:
        return 0
    before, after = as_float64(few_old, dtype), as_float64(few_new, dtype)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return 0
    energy = _energy(after - before)
    left = np.append(np.cumsum(energy[::-1])[::-1], 0.0) + float((_steps(after, dtype) ** 2).sum()) / 12
    most = min(len(energy) * 2 // 3, RANK_MAX, int(min(old.shape) * RANK_SHARE_MAX))
    factor_bits = FACTOR_BITS[-1] * sum(old.shape) / old.size
    saved = 0.5 * np.log2(left[0] / left[: most + 1]) - factor_bits * np.arange(most + 1)
    rank = int(saved.argmax())
    return rank if rank < most and saved[rank] >= SAVED_BITS_MIN else 0


def _energy(difference: Matrix) -> Matrix:
    """The squares of the singular values, the largest first."""
    scale = max(float(np.abs(difference).max()), float(np.finfo(np.float64).tiny))
    short = difference if len(difference) <= difference.shape[1] else difference.T
    # By einsum, since the threads of the matrix library would cost more than all of this work.
    squares = np.einsum("ij,kj->ik", short / scale, short / scale)
    return np.maximum(np.linalg.eigvalsh(squares)[::-1], 0.0) * scale**2


def _steps(numbers: Matrix, dtype: DType) -> Matrix:
    """The distance from each number to the next of its type."""
    mantissa = dtype.exponent[1] if dtype.exponent else 0
    return np.asarray(np.ldexp(1.0, np.frexp(numbers)[1] - 1 - mantissa))


def _factors(difference: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """The largest `rank` singular pairs, their values shared between both sides."""
    start = np.cos(np.outer(np.arange(difference.shape[1]) + 1.0, np.arange(rank + OVERSAMPLED) + 1.0) ** 2)
    basis = difference @ start
    for _ in range(2):
        basis, _ = np.linalg.qr(difference @ (difference.T @ np.linalg.qr(basis)[0]))
    u, values, v = np.linalg.svd(basis.T @ difference, full_matrices=False)
    root = np.sqrt(values[:rank])
    return (basis @ u[:, :rank]) * root, v[:rank] * root[:, np.newaxis]


def _fit(difference: Matrix, weights: Matrix, v: Matrix) -> Matrix:
    """Rows that, times v (columns by rank) transposed, come nearest to `difference` by weighted least squares."""
    rank = v.shape[1]
    squares = (v[:, :, np.newaxis] * v[:, np.newaxis, :]).reshape(len(v), rank * rank)
    normal = (weights @ squares).reshape(len(weights), rank, rank)
    right = (weights * difference) @ v
    return np.asarray(np.linalg.solve(normal, right[:, :, np.newaxis])[:, :, 0])


def _balanced(u: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
    """The same product by factors whose columns and rows are orthogonal and equally long."""
    left, a = np.linalg.qr(u)
    right, b = np.linalg.qr(v.T)
    inner, values, outer = np.linalg.svd(a @ b.T)
    root = np.sqrt(values)
    return (left @ inner) * root, (outer * root[:, np.newaxis]) @ right.T
