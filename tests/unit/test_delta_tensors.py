"""Each kind of change takes the method made for it, and costs about what it must."""

import struct

import numpy as np
import pytest

from common.delta.tensors import (
    ELEMENTS_MAX,
    PCO,
    ZSTD,
    Block,
    Coder,
    DType,
    Memory,
    Method,
    best,
    decode,
    encode,
    pack_low_rank,
    plan_low_rank,
)
from common.errors import IntegrityFailure

CODERS = [coder for coder in (PCO, ZSTD) if coder is not None]
RANDOM = np.random.default_rng(5)
WEIGHTS = RANDOM.normal(0, 0.05, (128, 256)).astype(np.float32)
OLD = WEIGHTS.reshape(-1).view(np.uint32)
SAME_TYPE = Block(DType.F32, DType.F32, OLD.size, 256)

with_any_coder = pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)


@pytest.fixture(autouse=True)
def drawn_anew() -> None:
    """What a test draws is its own, and does not depend on the tests that ran before it in the same process."""
    RANDOM.bit_generator.state = np.random.PCG64(6).state


def bits(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers).reshape(-1).view(f"<u{numbers.itemsize}")


def sent(old: np.ndarray | None, new: np.ndarray, block: Block, coder: Coder) -> tuple[Method, int]:
    """The method and the bytes that `best` takes, after checking that they give back `new`."""
    found = best(old, new, block, coder)
    assert found is not None
    assert np.array_equal(decode(found[0], old, block, found[1], coder, Memory()), new)
    return found[0], len(found[1])


def conditional_entropy_bytes(old: np.ndarray, new: np.ndarray) -> float:
    """Of the differences given the old exponent, for float32 of one sign per difference."""
    total = 0.0
    exponents = (old >> 23) & 255
    signed = np.where(new >> 31, ~new, new | 0x8000_0000).astype(np.int64)
    signed -= np.where(old >> 31, ~old, old | 0x8000_0000).astype(np.int64)
    for exponent in np.unique(exponents):
        _, counts = np.unique(signed[exponents == exponent], return_counts=True)
        total += float(-(counts * np.log2(counts / counts.sum())).sum()) / 8
    return total


@with_any_coder
def test_a_training_step_costs_about_its_entropy(coder: Coder) -> None:
    old = RANDOM.normal(0, 0.05, ELEMENTS_MAX).astype(np.float32)
    new = (old + 1e-7 * RANDOM.normal(0, 1, ELEMENTS_MAX)).astype(np.float32)
    method, size = sent(bits(old), bits(new), Block(DType.F32, DType.F32, ELEMENTS_MAX, 512), coder)
    assert method is Method.BUCKETED
    assert size <= (1.02 if coder is PCO else 1.06) * conditional_entropy_bytes(bits(old), bits(new))


@with_any_coder
def test_few_changes_are_sparse(coder: Coder) -> None:
    new = OLD.copy()
    new[::500] += 3
    assert sent(OLD, new, SAME_TYPE, coder) <= (Method.SPARSE, 120)


@with_any_coder
def test_changed_rows_pay_for_themselves_only(coder: Coder) -> None:
    new = WEIGHTS.copy()
    new[[3, 60, 61, 127]] *= np.float32(1.0001)
    method, size = sent(OLD, bits(new), SAME_TYPE, coder)
    assert method in {Method.ROWS, Method.SPARSE}
    assert size < 4 * 256 * 3


@with_any_coder
@pytest.mark.parametrize("signed_zeros", [False, True])
def test_pruning_by_magnitude_is_a_threshold(coder: Coder, signed_zeros: bool) -> None:
    keep = np.abs(WEIGHTS) >= np.float32(0.03)
    new = WEIGHTS * keep if signed_zeros else np.where(keep, WEIGHTS, np.float32(0))
    method, size = sent(OLD, bits(new), SAME_TYPE, coder)
    assert method is Method.MASK
    assert size < 10


@with_any_coder
def test_other_pruning_costs_a_bit_per_element(coder: Coder) -> None:
    new = np.where(RANDOM.random(WEIGHTS.shape) < 0.5, WEIGHTS, np.float32(0))
    method, size = sent(OLD, bits(new), SAME_TYPE, coder)
    assert method is Method.MASK
    assert size < OLD.size / 8 + 20


@with_any_coder
@pytest.mark.parametrize("dtype", [DType.I8, DType.I16, DType.I32, DType.I64, DType.I4], ids=lambda dtype: dtype.name)
def test_integers_cost_their_differences(coder: Coder, dtype: DType) -> None:
    old = RANDOM.integers(0, 256, 64_000 * dtype.bits.itemsize, np.uint8).view(dtype.bits)
    step = np.where(RANDOM.random(64_000) < 0.25, 1, 0).astype(dtype.bits)
    method, size = sent(old, old + step, Block(dtype, dtype, 64_000, 64_000), coder)
    assert method is Method.DIFFERENCE
    assert size < 64_000 * (0.85 if dtype is not DType.I4 else 1.1) / 8 * (1 if coder is PCO else 1.3)


@with_any_coder
@pytest.mark.parametrize("axis", [None, 0, 1], ids=["block", "column", "row"])
@pytest.mark.parametrize("largest", [np.float32(127), np.float32(91.7)], ids=["by maximum", "calibrated"])
def test_quantising_is_predicted(coder: Coder, axis: int | None, largest: np.float32) -> None:
    scales = np.abs(WEIGHTS).max(axis=axis, keepdims=True) / largest
    new = np.clip(np.rint(WEIGHTS / scales), -128, 127).astype(np.int8)
    method, size = sent(OLD, bits(new), Block(DType.I8, DType.F32, OLD.size, 256), coder)
    assert method is Method.CAST
    assert size <= 20 + (0 if axis is None or (axis == 1 and largest == 127) else 4 * scales.size)


@with_any_coder
def test_quantising_with_a_zero_point_is_predicted(coder: Coder) -> None:
    scale = np.float32((WEIGHTS.max() - WEIGHTS.min()) / 255)
    zero = np.rint(-WEIGHTS.min() / scale)
    new = np.clip(np.rint(WEIGHTS / scale) + zero, 0, 255).astype(np.uint8)
    method, size = sent(OLD, bits(new), Block(DType.I8, DType.F32, OLD.size, 256), coder)
    assert method is Method.CAST
    assert size <= 20


def every_float32_of_interest() -> np.ndarray:
    edges = [0, 1, 0x007F_FFFF, 0x0080_0000, 0x7F80_0000, 0x7F80_0001, 0x7FC1_2345, 0x7F7F_FFFF]
    edges += [0x477F_E000, 0x477F_EFFF, 0x477F_F000, 0x4780_0000, 0x3300_0000, 0x3300_0001, 0x3880_0000, 0x387F_F000]
    # Ties around every exponent, and noise.
    ties = [
        (exponent << 23) | low for exponent in range(256) for low in (0xFFF, 0x1000, 0x1001, 0x3000, 0x8000, 0x1_8000)
    ]
    values = np.array(edges + ties, np.uint32)
    noise = RANDOM.integers(0, 2**32, 50_000, np.uint32)
    return np.concatenate([values, values | 0x8000_0000, noise])


@with_any_coder
def test_floats_narrow_as_numpy_narrows_them(coder: Coder) -> None:
    old = every_float32_of_interest()
    numbers = old.view(np.float32)
    with np.errstate(all="ignore"):
        new = bits(np.where(np.isnan(numbers), np.float32(0), numbers).astype(np.float16))
    old = np.where(np.isnan(numbers), 0, old).astype(np.uint32)
    assert sent(old, new, Block(DType.F16, DType.F32, len(old), len(old)), coder) <= (Method.CAST, 8)


@with_any_coder
def test_bfloat16_is_float32_rounded_to_nearest_even(coder: Coder) -> None:
    words = {0x3F80_8000: 0x3F80, 0x3F81_8000: 0x3F82, 0x3F80_8001: 0x3F81, 0x7F7F_FFFF: 0x7F80, 0x8000_8000: 0x8000}
    words |= {0x7F80_0000: 0x7F80, 0xFF80_0001: 0xFFC0, 0x0000_8001: 0x0001, 0x0001_8000: 0x0002}
    old = np.array(list(words) * 20, np.uint32)
    new = np.array(list(words.values()) * 20, np.uint16)
    assert sent(old, new, Block(DType.BF16, DType.F32, len(old), len(old)), coder) <= (Method.CAST, 8)


@with_any_coder
@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16], ids=lambda dtype: dtype.name)
def test_widening_is_exact(coder: Coder, dtype: DType) -> None:
    old = np.arange(65_536, dtype=np.uint16)
    wide = (
        old.view(np.float16).astype(np.float32)
        if dtype is DType.F16
        else (old.astype(np.uint32) << 16).view(np.float32)
    )
    assert sent(old, bits(wide), Block(DType.F32, dtype, len(old), len(old)), coder) <= (Method.CAST, 8)


@with_any_coder
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.F64], ids=lambda dtype: dtype.name)
def test_a_merged_adapter_costs_its_factors(coder: Coder, dtype: DType) -> None:
    float_type = f"<f{dtype.bits.itemsize}"
    left, right = RANDOM.normal(0, 0.1, (192, 4)), RANDOM.normal(0, 0.1, (4, 256))
    old = RANDOM.normal(0, 0.05, (192, 256)).astype(float_type)
    old[0, 0] = 0.0
    new = (old.astype(np.float64) + left @ right).astype(float_type)
    old_bits, new_bits = (bits(matrix).reshape(192, 256) for matrix in (old, new))
    plan = plan_low_rank(old_bits, new_bits, dtype)
    assert plan is not None and len(plan.columns) == 4
    memory, size = Memory(), 0
    for begin in (0, 64, 128):
        some_old, some_new = (matrix[begin : begin + 64].reshape(-1) for matrix in (old_bits, new_bits))
        block = Block(dtype, dtype, 64 * 256, 256)
        payload = pack_low_rank(plan, begin, some_old, some_new, block, coder)
        assert np.array_equal(decode(Method.LOW_RANK, some_old, block, payload, coder, memory), some_new)
        size += len(payload)
    ordinary = encode(Method.BUCKETED, bits(old), bits(new), Block(dtype, dtype, 192 * 256, 256), coder)
    assert ordinary is not None
    assert size < len(ordinary) / (3 if dtype is DType.F32 else 1.5)


def first_step(shape: tuple[int, int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Of Adam, which moves each weight by nearly the same, whatever its gradient; that comes from so many tokens."""
    old = RANDOM.normal(0, 0.05, shape)
    gradient = RANDOM.normal(0, 1e-2, (shape[0], tokens)) @ RANDOM.normal(0, 1e-3, (tokens, shape[1]))
    return old.astype(np.float32), (old.astype(np.float32) - 2e-5 * gradient / (np.abs(gradient) + 1e-8)).astype("f4")


@with_any_coder
def test_signs_of_a_step_are_foretold(coder: Coder) -> None:
    old, new = first_step((256, 384), 4)
    block = Block(DType.F32, DType.F32, old.size, 384)
    method, size = sent(bits(old), bits(new), block, coder)
    ordinary = encode(Method.BUCKETED, bits(old), bits(new), block, coder)
    assert ordinary is not None
    assert size <= (0.85 if coder is PCO else 1) * len(ordinary)
    assert method is Method.GUIDED or coder is ZSTD


def test_a_step_that_nothing_foretells_is_not_guided() -> None:
    old = RANDOM.normal(0, 0.05, (256, 384)).astype(np.float32)
    new = (old + RANDOM.normal(0, 1e-5, old.shape)).astype(np.float32)
    block = Block(DType.F32, DType.F32, old.size, 384)
    assert encode(Method.GUIDED, bits(old), bits(new), block, ZSTD) is None
    assert sent(bits(old), bits(new), block, ZSTD)[0] is Method.BUCKETED


@pytest.mark.parametrize(
    "head", [b"\0\1", b"\1\0", b"\x41\1", b"\1\x81\x80\x40"], ids=["no rank", "no step", "rank", "step"]
)
def test_an_impossible_guide_is_refused_before_its_factors_are_read(head: bytes) -> None:
    with pytest.raises(IntegrityFailure, match=r"guide|exceeds"):
        decode(Method.GUIDED, OLD, SAME_TYPE, head + bytes(60), ZSTD, Memory())


def test_a_guide_may_be_as_large_as_the_format_allows() -> None:
    """A product of 2^20 in every place is still exact, and its level the highest."""

    def extreme(count: int) -> bytes:
        stream = ZSTD.pack(np.full(count, -128, np.int8))
        return bytes([len(stream)]) + stream

    block = Block(DType.F32, DType.F32, 8, 4)
    magnitudes = [b"", b"", ZSTD.pack(np.full(8, 5, np.int32))]
    signs = [b""] * 7 + [ZSTD.pack(np.array([0b1000_0001], np.uint8))]
    streams = b"".join(bytes([len(stream)]) + stream for stream in [*magnitudes, *signs[:-1]]) + signs[-1]
    # The step is 2^17, so the product has level 8, of which there is none: the highest is 7.
    payload = b"\x40" + b"\x80\x80\x08" + extreme(2 * 64) + extreme(4 * 64) + streams
    new = decode(Method.GUIDED, OLD[:8], block, payload, ZSTD, Memory())
    up = np.array([-5, 5, 5, 5, 5, 5, 5, -5])
    assert np.array_equal(new.view(np.int32), OLD[:8].view(np.int32) + np.where(OLD[:8] >> 31, -up, up))


def test_an_update_of_full_rank_gets_no_plan() -> None:
    old = RANDOM.normal(0, 0.05, (192, 256)).astype(np.float32)
    new = (old + RANDOM.normal(0, 1e-4, old.shape)).astype(np.float32)
    assert plan_low_rank(bits(old).reshape(old.shape), bits(new).reshape(old.shape), DType.F32) is None


def test_a_low_rank_payload_needs_the_one_before_it() -> None:
    old = RANDOM.normal(0, 0.05, (192, 256)).astype(np.float32)
    new = (old + np.outer(RANDOM.normal(0, 1, 192), RANDOM.normal(0, 1, 256))).astype(np.float32)
    plan = plan_low_rank(bits(old).reshape(old.shape), bits(new).reshape(old.shape), DType.F32)
    assert plan is not None
    block = Block(DType.F32, DType.F32, 64 * 256, 256)
    some_old, some_new = bits(old[64:128]), bits(new[64:128])
    payload = pack_low_rank(plan, 64, some_old, some_new, block, ZSTD)
    with pytest.raises(IntegrityFailure, match="before"):
        decode(Method.LOW_RANK, some_old, block, payload, ZSTD, Memory())


@with_any_coder
def test_new_weights_are_smaller_than_their_bytes(coder: Coder) -> None:
    method, size = sent(None, OLD, Block(DType.F32, None, OLD.size, 256), coder)
    assert method is Method.FRESH
    assert size < 0.88 * OLD.nbytes


def test_noise_is_not_made_larger() -> None:
    old, new = (RANDOM.integers(0, 256, 4_096, np.uint8) for _ in range(2))
    assert best(old, new, Block(DType.I8, DType.I8, 4_096, 4_096), ZSTD) is None


@pytest.mark.parametrize(
    "block",
    [
        Block(DType.I8, DType.I8, 0, 1),
        Block(DType.I8, DType.I8, ELEMENTS_MAX + 1, 1),
        Block(DType.F64, DType.F64, ELEMENTS_MAX, 1),
        Block(DType.I8, DType.I8, 10, 3),
        Block(DType.I8, DType.I8, 10, 0),
    ],
)
def test_geometry_outside_the_limits_is_refused(block: Block) -> None:
    with pytest.raises(IntegrityFailure):
        decode(Method.FRESH, None, block, b"", ZSTD, Memory())


@with_any_coder
def test_a_stream_cannot_ask_for_more_than_its_reader_wants(coder: Coder) -> None:
    data = coder.pack(np.arange(200_000, dtype=np.int32) % 977)
    with pytest.raises(IntegrityFailure):
        coder.unpack(data, 10, np.dtype("<i4"))
    with pytest.raises(IntegrityFailure):
        coder.unpack(data, 2**40, np.dtype("<i4"))


@with_any_coder
def test_every_truncation_of_a_payload_is_refused(coder: Coder) -> None:
    new = OLD.copy()
    new += RANDOM.integers(0, 9, OLD.size).astype(np.uint32)
    block = Block(DType.F32, DType.F32, 512, 256)
    payload = encode(Method.BUCKETED, OLD[:512], new[:512], block, coder)
    assert payload is not None
    for length in range(len(payload)):
        with pytest.raises(IntegrityFailure):
            decode(Method.BUCKETED, OLD[:512], block, payload[:length], coder, Memory())


def test_a_threshold_beyond_the_type_is_refused() -> None:
    payload = struct.pack("<B", 0) + b"\xff" * 5 + b"\x01"
    with pytest.raises(IntegrityFailure):
        decode(Method.MASK, OLD[:4], Block(DType.F32, DType.F32, 4, 4), payload, ZSTD, Memory())
