"""Which method gives the smallest payload for a block, and how each method is called."""

from collections.abc import Callable

import numpy as np

from common.delta.tensors import casting, fresh, guided, selections
from common.delta.tensors.block import Bits, Block, DType, Method
from common.delta.tensors.coders import ZSTD, Coder
from common.delta.tensors.differences import pack_differences, unpack_differences
from common.delta.tensors.low_rank import Known, unpack_low_rank
from common.errors import IntegrityFailure

SPARSE_SHARE_MAX = 1 / 8
"""Share of changed elements above which naming them costs more than their differences."""
ROWS_SHARE_MAX = 3 / 4
"""Share of changed rows up to which a bit per row pays."""
DENSE_SHARE_MIN = 1 / 256
"""Share of changed elements below which only naming them is tried."""
GUIDED_ELEMENTS_MIN = 16 * 1024
"""Fewer elements do not pay for the factors of a guide."""
ENOUGH_SHARE = 1 / 4096
"""Of the raw bytes: a payload this small ends the search."""
FRESH_SHARE_MIN = 3 / 4
"""Share of the raw bytes above which a difference is compared with new elements."""


class Memory:
    """What an earlier block of a patch leaves for later ones: the factor that the blocks of one matrix share."""

    def __init__(self) -> None:
        self.known: Known | None = None


def best(
    old: Bits | None, new: Bits, block: Block, coder: Coder, *, guides: bool = True
) -> tuple[Method, bytes] | None:
    """The smallest payload that any method finds for `new`, or None when sending the raw bytes is as good. No guide is
    looked for without `guides`.
    """
    found: list[tuple[Method, bytes]] = []
    for method in _promising(old, new, block, guides=guides):
        payload = encode(method, old, new, block, coder)
        if payload is not None:
            found.append((method, payload))
            # Whether a guide pays is known beforehand, except for tokens, which leave room for signs in magnitudes too.
            if len(payload) <= ENOUGH_SHARE * new.nbytes or (method is Method.GUIDED and coder is not ZSTD):
                break
    if not found or len(min(found, key=_length)[1]) > FRESH_SHARE_MIN * new.nbytes:
        found.append((Method.FRESH, fresh.pack_fresh(new, block, coder)))
    smallest = min(found, key=_length)
    return smallest if _length(smallest) < new.nbytes else None


def _length(candidate: tuple[Method, bytes]) -> int:
    return len(candidate[1])


def _promising(old: Bits | None, new: Bits, block: Block, *, guides: bool) -> list[Method]:
    """Methods worth trying, by a look at what changed; the ones that win outright first."""
    if old is None:
        return []
    if block.old_dtype is not block.dtype:
        return [Method.CAST]
    changed = old != new
    share = np.count_nonzero(changed) / block.count
    methods = [Method.MASK] if bool((new[changed] << new.dtype.type(1) == 0).any()) else []
    if share < SPARSE_SHARE_MAX:
        methods.append(Method.SPARSE)
    rows = changed.reshape(-1, block.columns).any(axis=1) if 1 < block.columns < block.count else np.ones(1, np.bool_)
    if np.count_nonzero(rows) <= ROWS_SHARE_MAX * len(rows):
        methods.append(Method.ROWS)
    elif share > DENSE_SHARE_MIN:
        methods += [Method.GUIDED] * (guides and block.count >= GUIDED_ELEMENTS_MIN)
        methods.append(dense(block.dtype))
    return methods


def dense(dtype: DType) -> Method:
    """How all elements of a type are written as differences."""
    return Method.DIFFERENCE if dtype.exponent is None else Method.BUCKETED


def encode(method: Method, old: Bits | None, new: Bits, block: Block, coder: Coder) -> bytes | None:
    """The payload of one method, or None when it cannot give these elements (`LOW_RANK` needs a plan)."""
    if method is Method.FRESH:
        return fresh.pack_fresh(new, block, coder)
    if old is None or (block.old_dtype is not block.dtype) is not (method is Method.CAST):
        return None
    if method in (Method.BUCKETED, Method.DIFFERENCE) and method is not dense(block.dtype):
        return None
    return None if method is Method.LOW_RANK else _PACKERS.get(method, _pack_dense)(old, new, block, coder)


def decode(  # noqa: PLR0917 - the parameters are one seam; the caller has them apart
    method: Method, old: Bits | None, block: Block, payload: bytes, coder: Coder, memory: Memory
) -> Bits:
    """The new elements of a block; IntegrityFailure when the payload, a stranger's bytes, does not give them."""
    block.check()
    if method is Method.FRESH:
        return fresh.unpack_fresh(payload, block, coder)
    if old is None or len(old) != block.count or (block.old_dtype is not block.dtype) is not (method is Method.CAST):
        raise IntegrityFailure(f"a payload of method {method.name} does not fit the old elements")
    if method in (Method.BUCKETED, Method.DIFFERENCE) and method is not dense(block.dtype):
        raise IntegrityFailure(f"a payload of method {method.name} does not fit elements of type {block.dtype.name}")
    if method is Method.LOW_RANK:
        new, memory.known = unpack_low_rank(old, payload, block, coder, memory.known)
        return new
    return _UNPACKERS.get(method, _unpack_dense)(old, payload, block, coder)


def _pack_dense(old: Bits, new: Bits, block: Block, coder: Coder) -> bytes:
    return pack_differences(old, new, block.dtype, coder)


def _unpack_dense(old: Bits, payload: bytes, block: Block, coder: Coder) -> Bits:
    return unpack_differences(old, payload, block.dtype, coder)


_PACKERS: dict[Method, Callable[[Bits, Bits, Block, Coder], bytes | None]] = {
    Method.SPARSE: selections.pack_sparse,
    Method.ROWS: selections.pack_rows,
    Method.MASK: selections.pack_mask,
    Method.CAST: casting.pack_cast,
    Method.GUIDED: guided.pack_guided,
}
_UNPACKERS: dict[Method, Callable[[Bits, bytes, Block, Coder], Bits]] = {
    Method.SPARSE: selections.unpack_sparse,
    Method.ROWS: selections.unpack_rows,
    Method.MASK: selections.unpack_mask,
    Method.CAST: casting.unpack_cast,
    Method.GUIDED: guided.unpack_guided,
}
