"""Between float types, on bits alone: rounding to nearest, ties to even (IEEE 754-2019, 4.3.1).

Numbers go the same way on every machine: NaNs keep their sign and the upper bits of their payload, and become quiet
when they are narrowed (as processors do it); subnormals stay what they are. `as_float64` and `rounded` serve
predictions, where only numbers that are finite matter.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.delta.tensors.block import Bits, DType


def convert(old: Bits, old_dtype: DType, dtype: DType) -> Bits | None:
    """Elements of one float type as another; None for a pair of types that nobody converts between."""
    match old_dtype, dtype:
        case DType.F32, DType.BF16:
            return _narrow_bf16(old)
        case DType.F32, DType.F16:
            return _narrow_f16(old)
        case DType.BF16, DType.F32:
            return old.astype("<u4") << np.uint32(16)
        case DType.F16, DType.F32:
            return _widen_f16(old)
    return None


def as_float64(values: Bits, dtype: DType) -> NDArray[np.float64]:
    """The numbers themselves, exactly; NaNs stay NaNs."""
    floats = (values.astype("<u4") << np.uint32(16)).view("<f4") if dtype is DType.BF16 else values
    with np.errstate(invalid="ignore"):  # a signalling NaN would be told to whoever reads the log
        return floats.view(f"<f{floats.itemsize}").astype(np.float64)


def rounded(numbers: NDArray[np.float64], dtype: DType) -> Bits:
    """The nearest elements of a float type; bfloat16 goes by way of float32. What NaNs become is left open."""
    with np.errstate(all="ignore"):
        if dtype is DType.BF16:
            return _narrow_bf16(numbers.astype("<f4").view("<u4"))
        out: Bits = numbers.astype(f"<f{dtype.bits.itemsize}").view(dtype.bits)
        return out


def _narrow_bf16(old: Bits) -> Bits:
    number = old + np.uint32(0x7FFF) + ((old >> np.uint32(16)) & np.uint32(1))
    nan = (old & np.uint32(0x7FFF_FFFF)) > 0x7F80_0000
    out: Bits = (np.where(nan, old | np.uint32(0x40_0000), number) >> np.uint32(16)).astype("<u2")
    return out


def _narrow_f16(old: Bits) -> Bits:
    magnitude = old & np.uint32(0x7FFF_FFFF)
    # Subnormal halves are multiples of 2^-24: the mantissa with its hidden bit is shifted to there. From 2^-14 on, the
    # exponent changes its bias, and a mantissa that rounds up carries into it (up to infinity).
    shift = np.minimum(np.uint32(126) - np.minimum(magnitude >> np.uint32(23), np.uint32(112)), np.uint32(31))
    mantissa = (magnitude & np.uint32(0x7F_FFFF)) | np.uint32(0x80_0000)
    small = _round(mantissa, shift)
    normal = _round(magnitude - np.uint32(112 << 23), np.uint32(13))
    number = np.where(magnitude < 113 << 23, small, np.minimum(normal, np.uint32(0x7C00)))
    nan = np.uint32(0x7E00) | ((magnitude >> np.uint32(13)) & np.uint32(0x3FF))
    number = np.where(magnitude >= 0x4780_0000, np.where(magnitude > 0x7F80_0000, nan, np.uint32(0x7C00)), number)
    out: Bits = (number | ((old >> np.uint32(16)) & np.uint32(0x8000))).astype("<u2")
    return out


def _round(values: Bits, shift: Any) -> Bits:
    """Without the lowest `shift` bits (1 to 31), ties to even; values are far below 2^31."""
    half = (np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1)
    out: Bits = (values + half + ((values >> shift) & np.uint32(1))) >> shift
    return out


def _widen_f16(old: Bits) -> Bits:
    wide = old.astype("<u4")
    exponent, mantissa = (wide >> np.uint32(10)) & np.uint32(31), wide & np.uint32(0x3FF)
    normal = ((exponent + np.uint32(112)) << np.uint32(23)) | (mantissa << np.uint32(13))
    special = np.uint32(0x7F80_0000) | (mantissa << np.uint32(13))
    # A subnormal half is its mantissa times 2^-24, exactly.
    small = (mantissa.astype("<f4") * np.float32(2.0**-24)).view("<u4")
    number = np.where(exponent == 0, small, np.where(exponent == 31, special, normal))
    out: Bits = number | ((wide & np.uint32(0x8000)) << np.uint32(16))
    return out
