"""Whatever bits a model holds and wherever it keeps them, they come back; whatever is done to a patch, it is refused by
name or gives exactly its target, and takes little memory.
"""

import contextlib
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from common import delta
from common.artifact.manifest import ArtifactRef
from common.artifact.source import BytesSource
from common.artifact.weights import ELEMENT_BITS, ONNX_TYPES, SAFETENSORS_TYPES, Weight, external_weights, weights
from common.delta import frames, reading, sparse, writing
from common.delta.layout import (
    FILE_BYTES_MAX,
    FRAMED,
    OPERATIONS_MAX,
    PAYLOAD_BYTES_MAX,
    PREFIXED,
    RAW,
    SPARSE,
    Fingerprint,
    Header,
    fingerprint,
    write_header,
)
from common.delta.tensors import NO_BASE, DType, Method
from common.delta.varint import varint
from common.errors import IntegrityFailure
from tests.patch_pairs import Pair, pairs
from tests.patches import block, copy, header, literal, patch_between, rebuilt, reference_to, section

LARGE_PATCH_BYTES = 1_500
"""Of a longer patch not every byte is flipped, but `FLIPS`."""
FLIPS = 250
MEMORY_BYTES_MAX = 6 * 1024 * 1024
"""What reading a short hostile patch may take; the largest pieces, streams and blocks are of 1 to 4 MiB."""

Tensor = tuple[str, str, tuple[int, ...], bytes]
"""Name, type, shape, payload."""

seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
kinds = st.sampled_from(["bits", "few", "near", "same", "gone", "renamed", "longer"])
few = settings(deadline=None, max_examples=30)


def specials(random: np.random.Generator, size: int) -> bytes:
    """Random bits, with all that floats have of oddities among them: in most formats, bytes of ones are NaNs with a
    payload, FF 80 and 7F C0 near infinities, 00 zeros and subnormals, 80 a negative zero.
    """
    bits = random.integers(0, 256, size, np.uint8)
    odd = random.choice(np.array([0x00, 0x01, 0x7C, 0x7F, 0x80, 0xC0, 0xF8, 0xFF], np.uint8), size)
    return bytes(np.where(random.random(size) < 0.3, odd, bits))


def changed(random: np.random.Generator, old: bytes, how: str) -> bytes:
    """Other bits throughout, at a few places, or only in a low byte here and there."""
    if how == "bits":
        return specials(random, len(old))
    new = np.frombuffer(old, np.uint8).copy()
    if how == "few":
        new[random.random(len(new)) < 0.02] ^= np.uint8(0x81)
    if how == "near":
        new[::8] += random.integers(0, 3, len(new[::8]), np.uint8)
    return new.tobytes()


def versions(seed: int, spec: list[tuple[str, tuple[int, ...], str]], bits: dict[str, int]) -> Iterator[list[Tensor]]:
    """The tensors of a model before and after."""
    random = np.random.default_rng(seed)
    before: list[Tensor] = []
    after: list[Tensor] = []
    for number, (kind, shape, how) in enumerate(spec):
        old = specials(random, payload_bytes(shape, bits[kind]))
        before.append((f"t{number}", kind, shape, old))
        longer = (shape[0] + 1, *shape[1:]) if how == "longer" and shape else shape
        new = changed(random, old, how)
        new += specials(random, payload_bytes(longer, bits[kind]) - len(new))
        if how != "gone":
            after.append((f"n{number}" if how == "renamed" else f"t{number}", kind, longer, new))
    yield before
    yield after


def payload_bytes(shape: tuple[int, ...], bits: int) -> int:
    return (math.prod(shape) * bits + 7) // 8


SAFETENSORS_BITS = {name: ELEMENT_BITS[kind] for name, kind in SAFETENSORS_TYPES.items()} | {"F4": 4, "F6_E3M2": 6}


def safetensors(tensors: list[Tensor]) -> bytes:
    entries, data = {}, b""
    for name, kind, shape, payload in tensors:
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": (len(data), len(data) + len(payload))}
        data += payload
    head = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    return len(head).to_bytes(8, "little") + head + data


@pytest.mark.parametrize("codec", delta.CODECS)
@few
@given(seed=seeds, spec=st.lists(st.tuples(st.sampled_from(sorted(SAFETENSORS_BITS)), shapes, kinds), max_size=6))
def test_any_bits_in_safetensors_come_back(codec: str, seed: int, spec: list[tuple[str, tuple[int, ...], str]]) -> None:
    base, target = (safetensors(tensors) for tensors in versions(seed, spec, SAFETENSORS_BITS))
    assert rebuilt(base, patch_between(base, target, codec), target) == target


COMPLEX = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
ONNX_BITS = {
    str(number): ELEMENT_BITS[kind] * (2 if number in COMPLEX else 1)
    for number, kind in ONNX_TYPES.items()
    if number <= onnx.TensorProto.INT4
}
PLACES = ("initializer", "constant", "branch", "function", "typed", "external")


def tensor_proto(tensor: Tensor, place: str, files: dict[str, bytes]) -> onnx.TensorProto:
    """As raw data, in the field of its type where it has one of its own, or in a data file."""
    name, kind, shape, payload = tensor
    proto = onnx.TensorProto(name=name, data_type=int(kind), dims=shape)
    if place == "typed" and int(kind) == onnx.TensorProto.FLOAT:
        proto.float_data.extend(np.frombuffer(payload, "<f4").tolist())
    elif place == "typed" and int(kind) == onnx.TensorProto.DOUBLE:
        proto.double_data.extend(np.frombuffer(payload, "<f8").tolist())
    elif place == "typed" and int(kind) == onnx.TensorProto.FLOAT16:
        proto.int32_data.extend(np.frombuffer(payload, "<u2").tolist())
    elif place == "external":
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", len(files["w.bin"])), ("length", len(payload))):
            proto.external_data.add(key=key, value=str(value))
        files["w.bin"] += payload
    else:
        proto.raw_data = payload
    return proto


def onnx_files(tensors: list[Tensor], places: list[str]) -> dict[str, bytes]:
    """The model and its data file, with the tensors at `places`, one after another."""
    files = {"w.bin": b""}
    inside, nodes, functions = [], [], []
    for number, tensor in enumerate(tensors):
        place = places[number % len(places)]
        proto = tensor_proto(tensor, place, files)
        constant = helper.make_node("Constant", [], [f"c{number}"], value=proto)
        if place == "constant":
            nodes.append(constant)
        elif place == "branch":
            branch = helper.make_graph([constant], "branch", [], [], [proto])
            nodes.append(helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch))
        elif place == "function":
            functions.append(helper.make_function("d", f"f{number}", [], [f"c{number}"], [constant], []))
        else:
            inside.append(proto)
    graph = helper.make_graph(nodes, "g", [], [], inside)
    files["model.onnx"] = helper.make_model(graph, functions=functions).SerializeToString()
    return files


@pytest.mark.parametrize("codec", delta.CODECS)
@few
@given(
    seed=seeds,
    spec=st.lists(st.tuples(st.sampled_from(sorted(ONNX_BITS)), shapes, kinds), max_size=6),
    places=st.lists(st.sampled_from(PLACES), min_size=1, max_size=6),
)
def test_any_bits_anywhere_in_onnx_models_come_back(
    codec: str, seed: int, spec: list[tuple[str, tuple[int, ...], str]], places: list[str]
) -> None:
    old, new = (onnx_files(tensors, places) for tensors in versions(seed, spec, ONNX_BITS))
    for name in new:
        parts: list[bytes] = []
        base_weights, target_weights = (found(files, name) for files in (old, new))
        delta.make(
            BytesSource(old[name]),
            BytesSource(new[name]),
            parts.append,
            codec=codec,
            base_weights=base_weights,
            target_weights=target_weights,
        )
        assert rebuilt(old[name], b"".join(parts), new[name]) == new[name]


def found(files: dict[str, bytes], name: str) -> tuple[Weight, ...]:
    model = BytesSource(files["model.onnx"])
    return weights(model) if name == "model.onnx" else external_weights(model, name, len(files[name]))


# Halves in int32_data are varints, which are compared as bytes.
FINDABLE = [(kind, place) for kind in sorted(ONNX_BITS) for place in PLACES if (kind, place) != ("10", "typed")]


@pytest.mark.parametrize(("kind", "place"), FINDABLE)
def test_tensors_are_found_wherever_they_are(kind: str, place: str) -> None:
    """So the tests above do try tensor blocks, and not only byte differences."""
    payload = bytes(range(1, 1 + 12 * ONNX_BITS[kind] // 8))
    files = onnx_files([("t", kind, (3, 4), payload)], [place])
    weights_found = found(files, "w.bin" if place == "external" else "model.onnx")
    sizes = {(weight.kind, weight.span.end - weight.span.start) for weight in weights_found}
    assert sizes == {(ONNX_TYPES[int(kind)], len(payload))}


@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_each_pair_uses_the_operation_that_it_is_named_after(pair: Pair) -> None:
    summary = delta.inspect(BytesSource(pair.patch))
    assert summary.codec == pair.codec
    assert pair.kind in {operation.kind for operation in summary.operations}
    assert rebuilt(pair.base, pair.patch, pair.target) == pair.target


def test_the_pairs_have_streams_of_every_kind() -> None:
    flags = [pair.body[0] for pair in pairs()]
    kinds = {(index, number >> 2 * index & 3) for number in flags for index in range(4)}
    assert kinds >= {(0, RAW), (0, FRAMED), (1, RAW), (1, FRAMED), (1, PREFIXED), (2, RAW), (2, SPARSE), (3, RAW)}


@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_a_patch_cut_off_at_any_byte_is_refused(pair: Pair) -> None:
    for length in range(len(pair.patch)):
        with pytest.raises(IntegrityFailure):
            rebuilt(pair.base, pair.patch[:length], pair.target)
        with pytest.raises(IntegrityFailure):
            delta.inspect(BytesSource(pair.patch[:length]))


@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_a_patch_with_any_byte_flipped_is_refused_or_gives_its_target(pair: Pair) -> None:
    step = 1 if len(pair.patch) <= LARGE_PATCH_BYTES else len(pair.patch) // FLIPS
    for place in range(0, len(pair.patch), step):
        damaged = bytearray(pair.patch)
        damaged[place] ^= 1 << place % 8
        with contextlib.suppress(IntegrityFailure):
            assert rebuilt(pair.base, bytes(damaged), pair.target) == pair.target
        with contextlib.suppress(IntegrityFailure):
            delta.inspect(BytesSource(bytes(damaged)))


@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_a_patch_with_a_byte_more_is_refused(pair: Pair) -> None:
    for more in (b"\0", b"\xff"):
        with pytest.raises(IntegrityFailure):
            rebuilt(pair.base, pair.patch + more, pair.target)
        with pytest.raises(IntegrityFailure):
            delta.inspect(BytesSource(pair.patch + more))


def test_a_tensor_of_more_axes_than_anybody_has_is_taken_for_bytes() -> None:
    """The product of a million large numbers would take minutes."""
    (weight,) = weights(BytesSource(safetensors([("w", "F32", (1,) * 33, bytes(4))])))
    assert (weight.kind, weight.shape) == ("I8", (4,))
    axes = b"\x0a\x20" + bytes((1,)) * 32
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, raw_data=bytes(4)).SerializeToString() + 3 * axes
    graph = b"\x2a" + varint(len(tensor)) + tensor
    (weight,) = weights(BytesSource(b"\x3a" + varint(len(graph)) + graph))
    assert weight.shape == (1,) * 32


def test_a_short_patch_of_endless_operations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes of control an operation, and a thousand of these a byte of the frame: such a patch could keep a reader
    busy for hours.
    """
    monkeypatch.setattr(reading, "OPERATIONS_MAX", 30_000)
    control = copy(1) * 20_000
    frame = frames.compress(control)
    body = (bytes((FRAMED,)) + varint(len(control)) + varint(len(frame)) + frame) * 2
    base = bytes(40_000)
    patch = header(base, base) + body
    assert len(patch) < 100
    for read in (lambda: rebuilt(base, patch, base), lambda: delta.inspect(BytesSource(patch))):
        with pytest.raises(IntegrityFailure, match="more than 30000 operations"):
            read()


def test_files_with_more_differences_than_a_patch_has_operations_still_get_a_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = np.random.default_rng(9).integers(0, 256, 10_000, np.uint8)
    new = np.insert(old, np.arange(50, 10_000, 100), 7).tobytes()
    base = old.tobytes()
    for limit in (10, 100, OPERATIONS_MAX):
        monkeypatch.setattr(writing, "OPERATIONS_MAX", limit)
        monkeypatch.setattr(reading, "OPERATIONS_MAX", limit)
        patch = patch_between(base, new)
        assert rebuilt(base, patch, new) == new
    kinds = {operation.kind for operation in delta.inspect(BytesSource(patch)).operations}
    assert "copy" in kinds


BASE = bytes(4096)
HUGE = 2**62
MIB = 2**20


def blocks(
    payload: bytes, method: Method, *, dtype: DType = DType.F32, old: int = DType.F32, columns: int = 16
) -> bytes:
    """A section with one block of 1024 elements."""
    return section(block(1024, len(payload), method=method, dtype=dtype, old=old, columns=columns), payloads=payload)


ZEROS = frames.compress(bytes(24 * MIB), level=1)
PACKED = (1, 4 * MIB, 24 * MIB, len(ZEROS))
PROMISES = {
    "control": bytes((1,)) + varint(HUGE),
    "literals": bytes((5,)) + varint(1) + varint(HUGE),
    "differences": bytes((17,)) + varint(1) + varint(HUGE),
    "payloads": bytes((65,)) + varint(1) + varint(HUGE),
    "framed-control": bytes((2,)) + varint(2**18) + varint(HUGE),
    "packed-differences": bytes((49,)) + varint(1) + varint(4 * MIB) + varint(HUGE),
    "packed-differences-that-are-there": bytes((49,)) + b"".join(map(varint, PACKED)) + b"\0" + ZEROS,
    "literal": section(literal(HUGE)),
    "frame": bytes((0,)) + varint(HUGE),
    "frame-of-the-target": bytes((0,)) + varint(FILE_BYTES_MAX) + b"\0" + varint(9) + bytes(9),
    "frame-in-the-patch": bytes((0,)) + varint(FILE_BYTES_MAX) + b"\0" + varint(HUGE),
    "prefix-parts": bytes((0,)) + varint(9) + varint(HUGE),
    "block": section(block(HUGE, 1, old=NO_BASE), payloads=b"1"),
    "block-columns": section(block(16, 1, old=NO_BASE, columns=HUGE), payloads=b"1"),
    "block-payload": section(block(16, HUGE, old=NO_BASE), payloads=b"1"),
    "block-payload-allowed": section(block(16, PAYLOAD_BYTES_MAX, old=NO_BASE), payloads=b"1"),
    "sparse-places": blocks(varint(HUGE) + varint(HUGE), Method.SPARSE),
    "sparse-part": blocks(varint(9) + varint(HUGE), Method.SPARSE),
    "rows-part": blocks(varint(HUGE), Method.ROWS),
    "mask-part": blocks(b"\2" + varint(HUGE), Method.MASK),
    "mask-magnitude": blocks(b"\0" + varint(HUGE), Method.MASK),
    "rank": blocks(varint(HUGE), Method.LOW_RANK),
    "rank-allowed": blocks(varint(256) + varint(9) + varint(HUGE), Method.LOW_RANK, columns=1024),
    "rank-shift": blocks(varint(1) + varint(HUGE), Method.LOW_RANK),
    "cast-part": blocks(b"\2\0\0" + varint(HUGE), Method.CAST, dtype=DType.I8),
    "difference-part": blocks(varint(HUGE), Method.DIFFERENCE, dtype=DType.I4, old=DType.I4),
    "fresh-planes": blocks(b"\1" + bytes(20), Method.FRESH, old=NO_BASE),
    "fresh-window": blocks(b"\2\x00\xff" + bytes(9), Method.FRESH, old=NO_BASE),
    "fresh-stream": blocks(b"\0" + b"\xff" * 30, Method.FRESH, old=NO_BASE),
}


@pytest.mark.parametrize("codec", delta.CODECS)
@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
def test_a_patch_that_promises_much_takes_no_memory_for_it(promise: bytes, codec: str) -> None:
    target = ArtifactRef(reference_to(b"").digest, FILE_BYTES_MAX)
    named = Fingerprint(fingerprint(target).prefix, FILE_BYTES_MAX)
    patch = write_header(Header(codec, fingerprint(reference_to(BASE)), named)) + promise
    for read in (lambda: rebuilt(BASE, patch, target), lambda: delta.inspect(BytesSource(patch))):
        assert allocated(read) < MEMORY_BYTES_MAX


RUNS = {
    "empty": varint(MIB) + bytes(3 * MIB),
    "ones": varint(MIB // 5) + b"\4" * (MIB // 5) + bytes(MIB // 5) + b"\1" * (MIB // 5) + bytes(MIB // 5),
    "long": varint(40) + b"\xff" * 80 + bytes(40),
    "longest": varint(40_000) + b"\xff" * 120_000,
}


@pytest.mark.parametrize("packed", RUNS.values(), ids=RUNS)
def test_packed_differences_take_no_more_memory_than_their_content(packed: bytes) -> None:
    assert allocated(lambda: sparse.unpack(packed, 4 * MIB)) < 3 * 4 * MIB


@pytest.mark.parametrize("pair", pairs(), ids=str)
def test_numbers_of_a_patch_made_huge_take_no_memory(pair: Pair) -> None:
    """A number is put where each of the first bytes after the header is."""
    start = len(header(pair.base, pair.target, pair.codec))
    for place in range(start, min(len(pair.patch), start + 40)):
        for number in (2**20, HUGE):
            patch = pair.patch[:place] + varint(number) + pair.patch[place + 1 :]
            assert allocated(partial(rebuilt, pair.base, patch, pair.target)) < MEMORY_BYTES_MAX


def allocated(read: Callable[[], object]) -> int:
    """The most memory at a time, in bytes, that `read` took until it was refused."""
    tracemalloc.start()
    try:
        with contextlib.suppress(IntegrityFailure):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
