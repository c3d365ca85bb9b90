"""Valid inputs for each target, from which mutation starts, and what targets and seeds agree on."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from common.artifact.parts import cut, encode_index, index_of
from common.artifact.protobuf import Span
from common.artifact.samples import Sample, encode_samples
from common.artifact.source import BytesSource
from common.artifact.tensors import DTYPES
from common.delta import sparse
from common.delta.layout import FRAMED, PREFIXED, RAW, SPARSE, read_header
from common.delta.operations import Add, Copy, Literal, TensorBlock
from common.delta.reading import Section, read
from common.delta.tensors import (
    BLOCK_BYTES_MAX,
    ELEMENTS_MAX,
    NO_BASE,
    PCO,
    ZSTD,
    Block,
    Coder,
    DType,
    Method,
    Plan,
    encode,
    pack_low_rank,
)
from common.delta.tensors.conversion import as_float64, rounded
from tests.patch_pairs import Pair, pairs
from tests.patches import add, block, copy, literal
from tests.small_models import model_bytes

CODERS: tuple[Coder, ...] = tuple(coder for coder in (ZSTD, PCO) if coder is not None)
SEEDED = np.random.default_rng(1)
BITS = SEEDED.integers(0, 256, BLOCK_BYTES_MAX * 2, np.uint8)
NUMBERS = SEEDED.standard_normal(4096).astype("f4")
SHIFT = 24
COLUMNS = SEEDED.integers(-1_000, 1_000, (2, ELEMENTS_MAX))


def old_elements(geometry: Block) -> np.ndarray | None:
    """Old elements: numbers like weights, then random bits; those of integers are random throughout."""
    if geometry.old_dtype is None:
        return None
    bits = geometry.old_dtype.bits
    elements = BITS[: geometry.count * bits.itemsize].view(bits).copy()
    if geometry.old_dtype.exponent is not None:
        numbers = rounded(NUMBERS.astype("f8"), geometry.old_dtype)[: geometry.count]
        elements[: len(numbers)] = numbers
    return elements


def bodies() -> Iterator[bytes]:
    return (bytes([number]) + pair.body for number, pair in enumerate(pairs()))


def patches() -> Iterator[bytes]:
    return (pair.patch for pair in pairs())


def patches_of_pairs() -> Iterator[bytes]:
    return (bytes([number]) + pair.patch for number, pair in enumerate(pairs()))


def streams() -> Iterator[bytes]:
    """The streams of each pair's patch, as they are and in frames of each kind."""
    for number, pair in enumerate(pairs()):
        written = _written(pair)
        if written is None:
            continue
        for literals, differences in ((RAW, RAW), (FRAMED, FRAMED), (PREFIXED, SPARSE)):
            packed = sparse.pack(written[2]) if differences == SPARSE else written[2]
            if len(packed) > len(written[2]):
                continue
            stored = [written[0], written[1], packed, written[3]]
            kinds = [min(literals, FRAMED), literals, differences, RAW]
            flags = sum(kind << 2 * index for index, kind in enumerate(kinds) if stored[index])
            lengths = [*map(len, stored[:3]), len(written[2])]
            numbers = b"".join(length.to_bytes(2, "little") for length in lengths)
            yield bytes([number, flags]) + numbers + b"".join(stored)


def _written(pair: Pair) -> list[bytes] | None:
    """Control, literals, differences and payloads of a patch; None for one that has a frame."""
    source = BytesSource(pair.patch)
    streams, shift = [b""] * 4, 0
    for step in read(source, *read_header(source), BytesSource(pair.base).read_at):
        if isinstance(step, Section):
            continue
        match step.operation:
            case Literal(data):
                streams[0] += literal(len(data))
                streams[1] += data
                continue
            case (Copy() | Add()) as operation:
                change = operation.offset - step.start - shift
                streams[0] += (copy if isinstance(operation, Copy) else add)(operation.length, change)
                streams[2] += b"" if isinstance(operation, Copy) else operation.differences
            case TensorBlock(offset, geometry, method, payload) as operation:
                old = NO_BASE if geometry.old_dtype is None else geometry.old_dtype
                size, columns = len(payload), geometry.columns
                streams[0] += block(
                    geometry.count, size, method=method, dtype=geometry.dtype, old=old, columns=columns,
                    shift_change=offset - step.start - shift,
                )  # fmt: skip
                streams[3] += payload
                if old == NO_BASE:
                    continue
            case _:
                return None
        shift = operation.offset - step.start
    return streams


def payloads() -> Iterator[bytes]:
    rows, columns = 8, 40
    for number, coder in enumerate(CODERS):
        for dtype in DType:
            geometry = Block(dtype, dtype, rows * columns, columns)
            old = old_elements(geometry)
            if old is None:
                continue
            for method in Method:
                for new in _changes(old, columns):
                    payload = encode(method, old, new, geometry, coder)
                    if payload is not None:
                        yield _decodable(method, geometry, number, payload)
            if dtype.exponent is not None:
                plan = Plan(COLUMNS[:, :rows].T, COLUMNS[:, :columns], SHIFT)
                for begin in (0, rows):
                    payload = pack_low_rank(
                        plan._replace(rows=np.tile(plan.rows, (2, 1))), begin, old, old, geometry, coder
                    )
                    yield _decodable(Method.LOW_RANK, geometry, number | 2 | SHIFT << 2, payload)
        yield from _casts(number, coder)
        yield from _guided(number, coder)


def _changes(old: np.ndarray, columns: int) -> Iterator[np.ndarray]:
    some = np.arange(len(old)) % 7 == 0
    yield old + old.dtype.type(3)
    yield np.where(some, 0, old).astype(old.dtype)
    yield np.where(some, old + old.dtype.type(1), old)
    yield np.where(np.arange(len(old)) // columns % 3 == 0, old + old.dtype.type(1), old)


def _casts(number: int, coder: Coder) -> Iterator[bytes]:
    for old_dtype, dtype in ((DType.F32, DType.I8), (DType.F32, DType.F16), (DType.BF16, DType.F32)):
        geometry = Block(dtype, old_dtype, 320, 40)
        old = old_elements(geometry)
        if old is None:
            continue
        numbers = as_float64(old, old_dtype)
        new = np.rint(numbers * 30).astype("i1").view("u1") if dtype is DType.I8 else rounded(numbers, dtype)
        new[::50] += new.dtype.type(1)
        payload = encode(Method.CAST, old, new, geometry, coder)
        if payload is not None:
            yield _decodable(Method.CAST, geometry, number, payload)


def _guided(number: int, coder: Coder) -> Iterator[bytes]:
    geometry = Block(DType.F16, DType.F16, 64 * 64, 64)
    old = old_elements(geometry)
    guide = SEEDED.standard_normal((64, 1)) @ SEEDED.standard_normal((1, 64))
    if old is not None:
        # As the bits of a float grow, so does its magnitude.
        signs = np.sign(guide).reshape(-1) * np.where(old >> 15, -1, 1)
        steps = (signs * SEEDED.integers(1, 4, len(old))).astype("i2").view("u2")
        payload = encode(Method.GUIDED, old, old + steps, geometry, coder)
        if payload is not None:
            yield _decodable(Method.GUIDED, geometry, number, payload)


def _decodable(method: Method, geometry: Block, flags: int, payload: bytes) -> bytes:
    old = NO_BASE if geometry.old_dtype is None else geometry.old_dtype
    shape = (geometry.count // geometry.columns, geometry.columns)
    return (
        bytes([method, old << 4 | geometry.dtype, flags]) + b"".join(n.to_bytes(2, "little") for n in shape) + payload
    )


def integer_streams() -> Iterator[bytes]:
    for number, coder in enumerate(CODERS):
        for log, width in enumerate((1, 2, 4, 8)):
            for spread in (2, 6, 8 * width - 2):
                values = SEEDED.integers(-(1 << spread), 1 << spread, 300).astype(f"<i{width}")
                yield bytes([number | log << 1]) + (300).to_bytes(2, "little") + coder.pack(values)
    # 64 tokens; each 15 has two low bits, each 11 one.
    yield bytes([8 | 3 << 1 | 3 << 4, 64, 0]) + bytes((15, 2, 11, 5)) * 16 + SEEDED.bytes(6)


def models() -> Iterator[bytes]:
    tensor = numpy_helper.from_array(np.arange(12, dtype="f4").reshape(3, 4), "w")
    packed = helper.make_tensor("packed", 1, (5,), [0.5] * 5)
    outside = helper.make_tensor("outside", 1, (5,), [0.5] * 5)
    outside.ClearField("float_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "16"), ("length", "20")):
        outside.external_data.add(key=key, value=value)
    yield model_bytes(initializers=[tensor, packed, outside])
    for entries in ('{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', '{"__metadata__":{"a":"b"}}'):
        yield len(entries).to_bytes(8, "little") + entries.encode() + bytes(24)


def samples() -> Iterator[bytes]:
    """Every type that a tensor may have, strings among them."""
    texts = np.array([["", "été"]], object)
    numbers = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in DTYPES.items() if dtype.kind != "O"}
    yield encode_samples([Sample("one", numbers, {"texts": texts})])
    yield encode_samples([Sample("one", {}, {"y": np.array(1.5)}), Sample("two", {"x": np.zeros((0, 4))}, {})])


def indexes() -> Iterator[bytes]:
    data = SEEDED.bytes(30_000)
    index = index_of(BytesSource(data), cut([Span(4_000, 14_000), Span(14_000, 22_222)], len(data)))
    yield len(data).to_bytes(8, "little") + encode_index(index)
