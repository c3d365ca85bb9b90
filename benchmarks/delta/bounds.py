"""The bound on what a patch of changed weights needs: the conditional entropy of their differences.

Floats are mapped to integers in the same order as their values; d = new - old. Most of what is known about d before
seeing it is the magnitude of the old weight, so the bound of a tensor is H(d | exponent of the old value), measured on
the tensor itself (Cover & Thomas, "Elements of Information Theory", section 2.2); for integers it is H(d). Counting
makes an entropy too low when most values occur once, since then each seems to be certain. So as many low bits of d as
it takes are counted as noise, until a value occurs `OCCURRENCES_MIN` times on average: where d repeats that much by
itself this is the plain entropy, elsewhere it supposes that d is smooth. Tensors that did not change cost nothing here.

Pure: arrays and bytes in, numbers out. Knows nothing of patches.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.delta.tensors import Tensor

OCCURRENCES_MIN = 8

_EXPONENT_BITS = {"F64": (64, 52), "F32": (32, 23), "F16": (16, 10), "BF16": (16, 7)}  # width, bits under the exponent
_INTEGER_BITS = {"I8": 8, "U8": 8, "I16": 16, "I32": 32, "I64": 64}


class Bound(NamedTuple):
    """What the changed tensors need, in bytes, and the bytes of tensors that have no old self to compare with."""

    bytes: float
    unmatched_bytes: int


def bound(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Bound:
    """The sum over tensors of the same name, dtype and shape."""
    bits, unmatched = 0.0, 0
    for name, after in new.items():
        before = old.get(name)
        if before is None or (before.dtype, before.shape) != (after.dtype, after.shape) or after.dtype not in _WIDTHS:
            unmatched += len(after.data)
        elif before.data != after.data:
            bits += conditional_entropy_bits(*differences(before, after))
    return Bound(bits / 8, unmatched)


_WIDTHS = {**{dtype: width for dtype, (width, _) in _EXPONENT_BITS.items()}, **_INTEGER_BITS}


def differences(old: Tensor, new: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(d, condition), int64 [elements]: wrapping differences, and the old exponents (zeros for integers)."""
    before, after = (np.frombuffer(tensor.data, f"<u{_WIDTHS[old.dtype] // 8}") for tensor in (old, new))
    if old.dtype not in _EXPONENT_BITS:
        return _signed(after - before), np.zeros(len(before), np.int64)
    width, low_bits = _EXPONENT_BITS[old.dtype]
    exponents = (before & before.dtype.type((1 << (width - 1)) - 1)) >> before.dtype.type(low_bits)
    return _signed(_ordered(after) - _ordered(before)), exponents.astype(np.int64)


def _ordered(bits: "NDArray[np.unsignedinteger]") -> "NDArray[np.unsignedinteger]":
    """Bits of floats as unsigned integers that sort like the floats: positive above the middle, negative mirrored."""
    top = bits.dtype.type(1 << (bits.itemsize * 8 - 1))
    return np.where(bits & top, ~bits, bits | top)


def _signed(wrapped: "NDArray[np.unsignedinteger]") -> NDArray[np.int64]:
    return wrapped.view(f"<i{wrapped.itemsize}").astype(np.int64)


def conditional_entropy_bits(values: NDArray[np.int64], conditions: NDArray[np.int64]) -> float:
    """H(values | conditions) of all elements together, in bits. Both int64 [elements], at least one."""
    order = np.lexsort((values, conditions))
    ends = np.cumsum(_run_lengths(conditions[order]))
    return sum(_entropy_bits(group) for group in np.split(values[order], ends[:-1]))


def _entropy_bits(ascending: NDArray[np.int64]) -> float:
    """H of all elements together, in bits, with the low bits that cannot be counted taken as noise."""
    noise_bits, counts = 0, _run_lengths(ascending)
    while len(counts) * OCCURRENCES_MIN > len(ascending) and len(counts) > _SIGNS:
        ascending = ascending >> 1
        noise_bits, counts = noise_bits + 1, _run_lengths(ascending)
    total = len(ascending)
    return float(total * np.log2(total) - (counts * np.log2(counts)).sum()) + noise_bits * total


_SIGNS = 2  # without any bit left, a difference is still 0 or -1


def _run_lengths(ascending: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value occurs."""
    changes = np.flatnonzero(ascending[1:] != ascending[:-1]) + 1
    return np.diff(np.concatenate(([0], changes, [len(ascending)])))
