"""For any edits the target comes back; for any damage there is a named refusal and never other bytes."""

import contextlib
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import delta
from common.artifact.source import BytesSource
from common.errors import IntegrityFailure
from tests.patches import header, patch_between, rebuilt

BASE = random.Random(11).randbytes(3_000)
TARGET = BASE[:1_000] + b"new bytes" + BASE[1_200:] + BASE[:300]
PATCH = patch_between(BASE, TARGET)
HEADER = header(BASE, TARGET)

edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "repeat"]),
        st.integers(0, 20_000),
        st.integers(0, 3_000),
        st.binary(max_size=200),
    ),
    max_size=12,
)


def edited(base: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    target = base
    for kind, place, length, data in changes:
        middle = {
            "replace": data + target[place + len(data) :],
            "insert": data + target[place:],
            "delete": target[place + length :],
            "repeat": target[place : place + length] + target[place:],
        }[kind]
        target = target[:place] + middle
    return target


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 20_000), alphabet=st.sampled_from([1, 2, 256]), changes=edits)
def test_the_target_comes_back_bit_for_bit(
    seed: int, size: int, alphabet: int, changes: list[tuple[str, int, int, bytes]]
) -> None:
    base = bytes(random.Random(seed).choices(range(alphabet), k=size))
    target = edited(base, changes)
    patch = patch_between(base, target)
    assert rebuilt(base, patch, target) == target
    assert delta.inspect(BytesSource(patch)).patch_bytes == len(patch)


@settings(deadline=None)
@given(base=st.binary(max_size=500), target=st.binary(max_size=500))
def test_unrelated_files_come_back_too(base: bytes, target: bytes) -> None:
    assert rebuilt(base, patch_between(base, target), target) == target


@pytest.mark.parametrize("length", range(len(PATCH)))
def test_every_truncation_is_refused_by_name(length: int) -> None:
    with pytest.raises(IntegrityFailure, match=r"cut off|not a patch"):
        rebuilt(BASE, PATCH[:length], TARGET)
    with pytest.raises(IntegrityFailure, match=r"cut off|not a patch"):
        delta.inspect(BytesSource(PATCH[:length]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(PATCH) - 1), st.integers(1, 255)), min_size=1, max_size=6))
@example([(len(PATCH) - 1, 1)])
def test_damage_never_gives_other_bytes(damage: list[tuple[int, int]]) -> None:
    patch = bytearray(PATCH)
    for place, flip in damage:
        patch[place] ^= flip
    with contextlib.suppress(IntegrityFailure):
        assert rebuilt(BASE, bytes(patch), TARGET) == TARGET
    with contextlib.suppress(IntegrityFailure):
        delta.inspect(BytesSource(bytes(patch)))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_garbage_after_a_valid_header_is_refused(garbage: bytes) -> None:
    with pytest.raises(IntegrityFailure):
        rebuilt(BASE, HEADER + garbage, TARGET)
