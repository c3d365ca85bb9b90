"""What a block of tensor elements is: its types, its shape, its limits.

Elements travel as numpy unsigned integers of the element's width, never as floats: a NaN's payload, -0 and subnormals
are bits like any others. Whether an integer type is signed does not matter, because differences are taken modulo 2^n.
Four-bit integers travel as bytes that hold two; `count` and `columns` then count those bytes.
"""

import enum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import IntegrityFailure

ELEMENTS_MAX: Final = 256 * 1024
"""Array entries in one block."""
BLOCK_BYTES_MAX: Final = 1024 * 1024
"""Bytes of new elements in one block."""
NO_BASE: Final = 15
"""Stands for "no old type" where types are written as four bits."""

Bits = NDArray[Any]
"""A one-dimensional array of unsigned integers: the bits of elements."""


class DType(enum.IntEnum):
    """The types of elements that blocks know, by the number that patches use for them."""

    I8 = 0
    I16 = 1
    I32 = 2
    I64 = 3
    F16 = 4
    BF16 = 5
    F32 = 6
    F64 = 7
    I4 = 8

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integer type in which elements travel."""
        return np.dtype(f"<u{_BYTES[self]}")

    @property
    def exponent(self) -> tuple[int, int] | None:
        """Width of the exponent and of the mantissa of a floating-point type, in bits; None for integers."""
        return _EXPONENT.get(self)


_BYTES = {
    DType.I8: 1,
    DType.I16: 2,
    DType.I32: 4,
    DType.I64: 8,
    DType.F16: 2,
    DType.BF16: 2,
    DType.F32: 4,
    DType.F64: 8,
    DType.I4: 1,
}
_EXPONENT = {DType.F16: (5, 10), DType.BF16: (8, 7), DType.F32: (8, 23), DType.F64: (11, 52)}


class Block(NamedTuple):
    """The geometry of one block: `count` new elements in rows of `columns`, over as many elements of `old_dtype`."""

    dtype: DType
    old_dtype: DType | None
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    columns: int

    def check(self) -> None:
        """Refuse geometry outside the limits of the format: IntegrityFailure."""
        if not 0 < self.count <= ELEMENTS_MAX or self.count * self.dtype.bits.itemsize > BLOCK_BYTES_MAX:
            raise IntegrityFailure(f"a block of {self.count} elements exceeds the limits of the format")
        if self.columns < 1 or self.count % self.columns:
            raise IntegrityFailure(f"a block of {self.count} elements does not divide into rows of {self.columns}")


class Method(enum.IntEnum):
    """How a block's payload gives its new elements, by the number that patches use."""

    FRESH = 0
    """All elements, without a base."""
    BUCKETED = 1
    """Floats: differences of ordered integers, sorted by the exponent of the old value."""
    SPARSE = 2
    """Where elements changed, and the changed elements."""
    ROWS = 3
    """Which rows changed, and the changed rows."""
    MASK = 4
    """Some elements are zero now, the others are as they were."""
    LOW_RANK = 5
    """Floats: the difference is about a product of two thin matrices."""
    CAST = 6
    """The old elements in another type."""
    DIFFERENCE = 7
    """Integers: differences modulo 2^n."""
    GUIDED = 8
    """Floats: differences whose signs and sizes a product of two thin matrices foretells."""
