"""Any bits of any type come back from any method with any coder; damaged payloads are refused by name."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.delta.tensors import PCO, ZSTD, Block, Coder, DType, Memory, Method, best, decode, encode
from common.errors import IntegrityFailure

CODERS = [coder for coder in (PCO, ZSTD) if coder is not None]

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 60), st.integers(1, 60))
changes = st.sampled_from(["all", "some", "few", "rows", "small", "step", "zeros", "none"])


def elements(random: np.random.Generator, dtype: DType, count: int) -> np.ndarray:
    """Random bits with all the special values of floats among them: NaNs, infinities, both zeros, subnormals."""
    bits = random.integers(0, 256, count * dtype.bits.itemsize, np.uint8).view(dtype.bits)
    if dtype.exponent is not None:
        width, mantissa = dtype.exponent
        exponents = dtype.bits.type(((1 << width) - 1) << mantissa)
        bits = np.where(random.random(count) < 0.1, bits | exponents, bits)
        bits = np.where(random.random(count) < 0.1, bits & ~exponents, bits)
        bits = np.where(random.random(count) < 0.1, bits & dtype.bits.type(1 << (width + mantissa)), bits)
    return bits.astype(dtype.bits)


def changed(random: np.random.Generator, old: np.ndarray, how: str, columns: int) -> np.ndarray:
    other = random.integers(0, 256, old.nbytes, np.uint8).view(old.dtype)
    chosen = {
        "all": np.ones(len(old), bool),
        "some": random.random(len(old)) < 0.5,
        "few": random.random(len(old)) < 0.05,
        "rows": np.repeat(random.random(len(old) // columns) < 0.3, columns),
    }
    if how in chosen:
        return np.where(chosen[how], other, old)
    if how == "step":
        sizes, signs = random.integers(0, 90, len(old)), random.integers(0, 2, (2, len(old)))
        down = signs[0, : len(old) // columns, np.newaxis] ^ signs[1, :columns] ^ (random.random(columns) < 0.1)
        moved: np.ndarray = old + np.where(down.reshape(-1), -sizes, sizes).astype(old.dtype)
        return moved
    if how == "small":
        near: np.ndarray = old + (random.integers(0, 3, len(old)) - 1).astype(old.dtype)
        return near
    return np.where(random.random(len(old)) < 0.5, 0, old).astype(old.dtype) if how == "zeros" else old.copy()


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@settings(deadline=None)
@given(seed=seeds, dtype=st.sampled_from(DType), shape=shapes, how=changes)
def test_every_method_gives_back_every_bit(
    coder: Coder, seed: int, dtype: DType, shape: tuple[int, int], how: str
) -> None:
    random = np.random.default_rng(seed)
    block = Block(dtype, dtype, shape[0] * shape[1], shape[1])
    old = elements(random, dtype, block.count)
    new = changed(random, old, how, block.columns)
    for method in Method:
        payload = encode(method, old, new, block, coder)
        if payload is not None:
            assert np.array_equal(decode(method, old, block, payload, coder, Memory()), new), method
    found = best(old, new, block, coder)
    if found is not None:
        assert len(found[1]) < new.nbytes
        assert np.array_equal(decode(found[0], old, block, found[1], coder, Memory()), new)


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@settings(deadline=None)
@given(seed=seeds, old_dtype=st.sampled_from(DType), dtype=st.sampled_from(DType), shape=shapes)
def test_casts_between_any_types_give_back_every_bit(
    coder: Coder, seed: int, old_dtype: DType, dtype: DType, shape: tuple[int, int]
) -> None:
    random = np.random.default_rng(seed)
    block = Block(dtype, old_dtype, shape[0] * shape[1], shape[1])
    old, new = elements(random, old_dtype, block.count), elements(random, dtype, block.count)
    payload = encode(Method.CAST, old, new, block, coder)
    if payload is not None:
        assert np.array_equal(decode(Method.CAST, old, block, payload, coder, Memory()), new)


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@settings(deadline=None)
@given(
    seed=seeds,
    width=st.sampled_from([1, 2, 4, 8]),
    spread=st.integers(0, 63),
    count=st.one_of(st.integers(0, 40), st.integers(0, 5_000)),
)
def test_coders_give_back_every_integer(coder: Coder, seed: int, width: int, spread: int, count: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(-(2**63), 2**63 - 1, count) >> spread
    values = values.astype(f"<i{width}")
    data = coder.pack(values)
    assert np.array_equal(coder.unpack(data, count, values.dtype), values)
    for wrong in (max(0, count - 1), count + 1):
        with contextlib.suppress(IntegrityFailure):
            assert len(coder.unpack(data, wrong, values.dtype)) == wrong


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@settings(deadline=None)
@given(
    seed=seeds,
    dtype=st.sampled_from(DType),
    old_dtype=st.sampled_from([None, *DType]),
    method=st.sampled_from(Method),
    payload=st.binary(max_size=200),
)
def test_random_payloads_are_refused_or_give_elements(
    coder: Coder, seed: int, dtype: DType, old_dtype: DType | None, method: Method, payload: bytes
) -> None:
    block = Block(dtype, old_dtype, 60, 6)
    old = None if old_dtype is None else elements(np.random.default_rng(seed), old_dtype, block.count)
    with contextlib.suppress(IntegrityFailure):
        out = decode(method, old, block, payload, coder, Memory())
        assert len(out) == block.count and out.dtype == dtype.bits


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@settings(deadline=None)
@given(
    seed=seeds,
    dtype=st.sampled_from(DType),
    how=changes,
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    cut=st.booleans(),
)
def test_damaged_payloads_are_refused_or_give_elements(
    coder: Coder, seed: int, dtype: DType, how: str, place: float, flip: int, cut: bool
) -> None:
    random = np.random.default_rng(seed)
    block = Block(dtype, dtype, 2_400, 40)
    old = elements(random, dtype, block.count)
    new = changed(random, old, how, block.columns)
    for method in Method:
        payload = encode(method, old, new, block, coder)
        if payload is None:
            continue
        at = int(place * len(payload))
        damaged = payload[:at] if cut else payload[:at] + bytes([payload[at] ^ flip]) + payload[at + 1 :]
        with contextlib.suppress(IntegrityFailure):
            out = decode(method, old, block, damaged, coder, Memory())
            assert len(out) == block.count and out.dtype == dtype.bits
