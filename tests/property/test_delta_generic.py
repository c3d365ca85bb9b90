"""Whatever was done to a file, the byte differ finds operations that rebuild it, and sparse packing loses nothing."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.artifact.protobuf import Span
from common.artifact.source import BytesSource
from common.delta import generic, sparse
from common.delta.operations import Add, Copy, Literal
from common.errors import IntegrityFailure

ALPHABETS = st.sampled_from([b"\0", b"ab", b"\0\x01\xff", bytes(range(256))])


@st.composite
def contents(draw: st.DrawFn, size_max: int = 2_000) -> bytes:
    """Bytes of few or many values, often in repeated pieces."""
    alphabet = np.frombuffer(draw(ALPHABETS), np.uint8)
    noise = np.random.default_rng(draw(st.integers(0, 1_000)))
    piece = noise.choice(alphabet, draw(st.integers(0, size_max))).astype(np.uint8).tobytes()
    return piece * draw(st.integers(1, 3))


@st.composite
def edited(draw: st.DrawFn, base: bytes) -> bytes:
    """`base` with parts moved, repeated, replaced, changed here and there, and new bytes between."""
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(base)))
        part = np.frombuffer(base[start : start + draw(st.integers(0, 1_500))], np.uint8).copy()
        part[:: draw(st.sampled_from([7, 50, 10_000]))] += draw(st.integers(0, 3))
        parts.append(part.tobytes() + draw(st.binary(max_size=12)))
    return b"".join(parts)


def rebuilt(base: bytes, operations: list[Copy | Add | Literal]) -> bytes:
    out = []
    for operation in operations:
        assert operation.length > 0
        if isinstance(operation, Literal):
            out.append(operation.data)
            continue
        assert 0 <= operation.offset <= len(base) - operation.length
        old = np.frombuffer(base, np.uint8, operation.length, operation.offset)
        add = np.frombuffer(operation.differences, np.uint8) if isinstance(operation, Add) else np.uint8(0)
        out.append((old + add).tobytes())
    return b"".join(out)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_operations_rebuild_any_target_small_or_laid_over(data: st.DataObject) -> None:
    base = data.draw(contents())
    target = data.draw(st.one_of(edited(base), contents()))
    limit = data.draw(st.sampled_from([generic.SMALL_BYTES_MAX, 0]))
    cut = sorted((data.draw(st.integers(0, len(base))), data.draw(st.integers(0, len(base)))))
    shift = data.draw(st.integers(-3_000, 3_000))
    span = Span(data.draw(st.integers(0, len(target))), len(target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generic, "SMALL_BYTES_MAX", limit)
        found = list(generic.diff(BytesSource(base), (Span(*cut),), BytesSource(target), span, shift=shift))
    assert rebuilt(base, found) == target[span.start :]


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 3, 4, 300, 70_000]), st.sampled_from([1, 2, 255, 256, 600])), max_size=5)
)
def test_sparse_packing_gives_back_every_byte(runs: list[tuple[int, int]]) -> None:
    dense = b"".join(bytes(gap) + b"\x07" * length for gap, length in runs) + bytes(5)
    packed = sparse.pack(dense)
    assert sparse.unpack(packed, len(dense)) == dense


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 100))
def test_packed_differences_of_a_stranger_are_refused_or_fill_what_was_asked_for(packed: bytes, size: int) -> None:
    with contextlib.suppress(IntegrityFailure):
        assert len(sparse.unpack(packed, size)) == size
