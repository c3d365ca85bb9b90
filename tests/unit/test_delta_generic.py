"""The byte differ rebuilds any target, finds what moved, and writes little where little changed."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from common.artifact.protobuf import Span
from common.artifact.source import BytesSource
from common.delta.generic import diff
from common.delta.generic.alignment import WINDOW_BYTES
from common.delta.generic.pricing import written_bytes
from common.delta.generic.seeds import ENTRIES_MAX, SeedIndex, seed_hashes
from common.delta.operations import Add, Copy, Literal

NOISE = random.Random(1).randbytes(3_000_000)
NAMES = b"".join(b"\n\x12/model/layer.%d/attention/output_%d\x12\x04Conv" % (n, n * 7919 % 1000) for n in range(400))


def operations(base: bytes, target: bytes, *, shift: int | None = None) -> list[Copy | Add | Literal]:
    """What the differ finds, proven to rebuild `target`."""
    whole, span = (Span(0, len(base)),), Span(0, len(target))
    found = list(diff(BytesSource(base), whole, BytesSource(target), span, shift=shift))
    assert b"".join(written(base, operation) for operation in found) == target
    return found


def written(base: bytes, operation: Copy | Add | Literal) -> bytes:
    """What a device would write."""
    assert operation.length > 0
    if isinstance(operation, Literal):
        return operation.data
    assert 0 <= operation.offset <= len(base) - operation.length
    old = base[operation.offset : operation.offset + operation.length]
    if isinstance(operation, Copy):
        return old
    return bytes((np.frombuffer(old, np.uint8) + np.frombuffer(operation.differences, np.uint8)).tobytes())


def patch_bytes(base: bytes, target: bytes, found: Sequence[Copy | Add | Literal]) -> int:
    return written_bytes(found, 0, BytesSource(base), len(target))


def test_equal_files_are_one_copy_whatever_their_size() -> None:
    for size in (1, 1_000, len(NOISE)):
        assert operations(NOISE[:size], NOISE[:size]) == [Copy(0, size)]


def test_fifty_megabytes_of_zeros_are_one_copy() -> None:
    zeros = bytes(50_000_000)
    assert list(diff(BytesSource(zeros), (Span(0, len(zeros)),), BytesSource(zeros), Span(0, len(zeros)))) == [
        Copy(0, len(zeros))
    ]


@pytest.mark.parametrize(
    ("base", "target"),
    [
        (b"", b""),
        (b"", b"new"),
        (b"old", b""),
        (b"short", b"shorter"),
        (bytes(3_000_000), bytes(2_000_000)),
        (bytes(1_500_000), bytes(3_000_000)),
        (bytes(1_000) + b"1", bytes(70_000)),
        (b"ab" * 700_000, b"ba" * 800_000),
        (NOISE[:5_000], NOISE[:5_000] * 300),
        (NOISE[:1_400_000], NOISE[1_400_000:]),
        (NOISE[:40_000], NOISE[50_000:90_000]),
    ],
    ids=[
        "nothing",
        "from-nothing",
        "to-nothing",
        "tiny",
        "fewer",
        "more",
        "zeros",
        "period",
        "often",
        "noise",
        "small",
    ],
)
def test_corner_cases_are_rebuilt_in_few_operations(base: bytes, target: bytes) -> None:
    assert len(operations(base, target)) <= 2 + 2 * len(target) // max(min(len(base), WINDOW_BYTES), 1)


def test_a_byte_changed_in_place_costs_a_few_bytes() -> None:
    target = NOISE[:100_000] + b"?" + NOISE[100_001:200_000]
    found = operations(NOISE[:200_000], target)
    assert len(found) == 3
    assert patch_bytes(NOISE[:200_000], target, found) < 16


@pytest.mark.parametrize("size", [200_000, 2_900_000], ids=["small", "large"])
def test_moved_inserted_and_removed_bytes_are_found_exactly(size: int) -> None:
    base = NOISE[:size]
    target = base[50_000:90_000] + b"something new" + base[:40_000] + base[100_000:]
    found = operations(base, target)
    assert sum(operation.length for operation in found if isinstance(operation, Copy)) == len(target) - 13
    assert patch_bytes(base, target, found) < 64


def test_a_short_match_is_used_where_it_is_cheaper_than_its_bytes() -> None:
    target = NOISE[200_000:200_050] + NOISE[1_000:1_016] + NOISE[210_000:210_050]
    assert Copy(1_000, 16) in operations(NOISE[:20_000], target)


def test_code_that_moved_with_other_addresses_in_it_becomes_differences_that_are_mostly_zero() -> None:
    old = np.frombuffer(NOISE, np.uint8, 2_400_000).copy()
    new = old.copy()
    new[::40] += 3
    base, target = old.tobytes(), NOISE[2_500_000:2_500_100] + new.tobytes()
    found = operations(base, target)
    literals = sum(operation.length for operation in found if isinstance(operation, Literal))
    assert literals < 200
    assert patch_bytes(base, target, found) < 20_000


def test_the_border_of_what_moved_goes_where_most_bytes_agree() -> None:
    old = np.frombuffer(NOISE, np.uint8, 2_400_000).copy()
    new = np.delete(old, np.arange(1_000_000, 1_000_500))
    new[999_900:1_000_100:7] += 1
    found = operations(old.tobytes(), new.tobytes())
    changed = [operation for operation in found if isinstance(operation, Add)]
    assert not any(isinstance(operation, Literal) for operation in found)
    assert sum(np.count_nonzero(np.frombuffer(each.differences, np.uint8)) for each in changed) < 40


def test_a_graph_with_all_names_changed_goes_as_literals_with_the_old_one_as_prefix() -> None:
    target = NAMES.replace(b"/model/", b"/net/").replace(b"Conv", b"Gemm")
    found = operations(NAMES, target)
    assert patch_bytes(NAMES, target, found) <= patch_bytes(NAMES, target, [Literal(target)])


def test_the_hint_says_where_to_look_first() -> None:
    block = NOISE[:1_000]
    base = block + NOISE[5_000:5_500] + block
    assert operations(base, block, shift=1_500) == [Copy(1_500, 1_000)]
    assert operations(base, block) == [Copy(0, 1_000)]


def test_only_the_target_span_is_written_and_only_the_base_spans_are_searched() -> None:
    base, target = BytesSource(NOISE[:60_000]), BytesSource(NOISE[200_000:210_000] + NOISE[30_000:31_000] + b"end")
    span = Span(10_000, 11_000)
    assert list(diff(base, (Span(25_000, 35_000),), target, span)) == [Copy(30_000, 1_000)]
    assert list(diff(base, (Span(0, 20_000),), target, span)) == [Literal(NOISE[30_000:31_000])]


def test_the_same_files_give_the_same_operations() -> None:
    target = NOISE[1_000_000:2_000_000] + NOISE[:900_000] + b"x" * 500 + NOISE[2_000_000:]
    assert operations(NOISE, target) == operations(NOISE, target)


def test_the_search_tells_how_far_it_has_come() -> None:
    told: list[int] = []
    target = BytesSource(NOISE[::-1])
    list(diff(BytesSource(NOISE), (Span(0, len(NOISE)),), target, Span(0, target.size), passed=told.append))
    assert told == sorted(told)
    assert told[-1] == len(NOISE)


@pytest.mark.parametrize(("width", "step"), [(4, 1), (8, 1), (16, 8), (32, 32), (64, 128)])
def test_every_seed_entered_is_found_nearest_to_where_it_is_expected(width: int, step: int) -> None:
    data = NOISE[:10_000] + NOISE[:10_000]
    spans = (Span(0, 5_000), Span(10_000, 15_000))
    index = SeedIndex(BytesSource(data), spans, width=width, step=step)
    hashes = seed_hashes(NOISE[:5_000], width)
    places = index.places(hashes)
    assert set(range(0, 5_000 - width + 1, step)) <= set(places.tolist())
    assert (index.nearest(hashes[places], places) == places).all()
    assert (index.nearest(hashes[places], places + 10_000) == places + 10_000).all()


def test_an_index_never_holds_more_than_its_limit() -> None:
    with pytest.raises(ValueError, match="wider step"):
        SeedIndex(BytesSource(b""), (Span(0, ENTRIES_MAX + 8),), width=8, step=1)
