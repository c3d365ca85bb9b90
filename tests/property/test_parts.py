"""Parts: two indexes say exactly what must be fetched, and strangers' indexes are one named error."""

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact import parts
from common.artifact.parts import Part, assemble, cut, decode_index, encode_index, index_of, missing, missing_bytes
from common.artifact.protobuf import Span
from common.artifact.source import BytesSource
from common.errors import IntegrityFailure

KB = 1024
blocks = st.lists(st.sampled_from([(0, 5000), (1, 1024), (2, 1023), (3, 500), (4, 40), (5, 1)]), max_size=12)
spans = st.lists(st.builds(lambda start, size: Span(start, start + size), st.integers(0, 40_000), st.integers(0, 9000)))


def file_of(content: list[tuple[int, int]]) -> tuple[bytes, tuple[Part, ...]]:
    """A file of runs of equal bytes, and its index with one part a run."""
    data = b"".join(bytes([value]) * size for value, size in content)
    edges = [sum(size for _, size in content[:count]) for count in range(len(content) + 1)]
    return data, index_of(BytesSource(data), [Span(*pair) for pair in pairwise(edges)])


@given(tensors=spans, size=st.integers(0, 40_000))
def test_a_cut_covers_the_file_in_order_whatever_the_tensors_are(tensors: list[Span], size: int) -> None:
    ranges = cut(tensors, size)
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
    assert (ranges[-1].end if ranges else 0) == size
    assert all(start < end for start, end in ranges)


def test_a_large_tensor_is_a_part_and_a_small_one_is_not() -> None:
    assert cut([Span(10, 10 + 4 * KB), Span(9000, 9100)], 20_000) == ((0, 10), (10, 4106), (4106, 20_000))


def test_a_part_is_at_most_a_mebibyte_counted_from_where_its_tensor_begins() -> None:
    mib = 1024 * KB
    assert cut([Span(100, 100 + 2 * mib + 1)], 3 * mib) == (
        (0, 100),
        (100, 100 + mib),
        (100 + mib, 100 + 2 * mib),
        (100 + 2 * mib, 101 + 2 * mib),
        (101 + 2 * mib, 3 * mib),
    )


@pytest.mark.parametrize("size", [parts.PARTS_MAX * parts.PART_BYTES_MAX + 1, 100 * 2**30])
def test_a_huge_file_is_cut_coarser_instead_of_into_too_many_parts(size: int) -> None:
    ranges = cut([], size)
    assert parts.PARTS_MAX / 2 <= len(ranges) <= parts.PARTS_MAX
    assert ranges[-1].end == size


def test_very_many_tensors_are_put_together() -> None:
    tensors = [Span(start, start + 4 * KB) for start in range(0, 4 * KB * 20_000, 4 * KB)]
    assert len(cut(tensors, 4 * KB * 20_000)) <= parts.PARTS_MAX


@given(content=blocks)
def test_an_index_survives_the_trip(content: list[tuple[int, int]]) -> None:
    data, index = file_of(content)
    assert decode_index(encode_index(index), len(data)) == index


def test_a_truncated_index_is_refused_at_every_byte() -> None:
    data, index = file_of([(1, 5000), (2, 70), (3, 200_000)])
    encoded = encode_index(index)
    for length in range(len(encoded)):
        with pytest.raises(IntegrityFailure):
            decode_index(encoded[:length], len(data))


def test_a_damaged_index_is_refused_or_names_other_parts_of_the_same_file() -> None:
    data, index = file_of([(1, 5000), (2, 70), (3, 200_000)])
    encoded = bytearray(encode_index(index))
    for place in range(len(encoded)):
        for bit in range(8):
            encoded[place] ^= 1 << bit
            with contextlib.suppress(IntegrityFailure):
                read = decode_index(bytes(encoded), len(data))
                assert read != index
                assert sum(part.size for part in read) == len(data)
            encoded[place] ^= 1 << bit


@given(data=st.binary(max_size=200), size=st.integers(0, 2**64))
def test_random_bytes_never_raise_anything_else(data: bytes, size: int) -> None:
    with contextlib.suppress(IntegrityFailure):
        decode_index(parts.MAGIC + data, size)


def test_too_many_parts_are_refused() -> None:
    index = [Part(bytes(16), place, 1) for place in range(parts.PARTS_MAX + 1)]
    with pytest.raises(IntegrityFailure, match="part 8192"):
        decode_index(encode_index(index), len(index))
    with pytest.raises(IntegrityFailure, match="the limit is"):
        decode_index(bytes(parts.INDEX_BYTES_MAX + 1), 1)


@given(held=st.lists(blocks, max_size=3), wanted=blocks)
def test_what_is_assembled_is_the_file(held: list[list[tuple[int, int]]], wanted: list[tuple[int, int]]) -> None:
    files = [file_of(content) for content in held]
    data, index = file_of(wanted)
    built = b""
    for one in assemble([one for _, one in files], index):
        assert one.start == len(built)
        source, start = (data, one.start) if one.held is None else (files[one.held][0], one.offset)
        built += source[start : start + one.end - one.start]
    assert built == data


@given(held=st.lists(blocks, max_size=3), wanted=blocks)
def test_what_is_missing_is_what_a_plain_search_finds(
    held: list[list[tuple[int, int]]], wanted: list[tuple[int, int]]
) -> None:
    files = [file_of(content) for content in held]
    _, index = file_of(wanted)
    known = {(part.digest, part.size) for _, one in files for part in one}
    needed = [(part.digest, part.size) not in known for part in index for _ in range(part.size)]
    for start, end in _gaps(needed):
        if end - start < parts.GAP_BYTES_MAX:
            needed[start:end] = [True] * (end - start)
    assert missing_bytes([one for _, one in files], index) == sum(needed)
    covered = [place for span in missing([one for _, one in files], index) for place in range(*span)]
    assert covered == [place for place, is_needed in enumerate(needed) if is_needed]


def _gaps(needed: list[bool]) -> list[tuple[int, int]]:
    """The runs of False between two True."""
    places = [place for place, is_needed in enumerate(needed) if is_needed]
    return [(one + 1, two) for one, two in pairwise(places) if two > one + 1]


@pytest.mark.parametrize(("gap", "requests"), [(parts.GAP_BYTES_MAX - 1, 1), (parts.GAP_BYTES_MAX, 2)])
def test_a_short_held_run_is_fetched_rather_than_asked_around(gap: int, requests: int) -> None:
    _, held = file_of([(7, gap)])
    _, wanted = file_of([(1, 5000), (7, gap), (2, 5000), (7, gap)])
    assert len(missing([held], wanted)) == requests


def test_a_part_of_no_bytes_is_refused() -> None:
    _, index = file_of([(1, 5000)])
    with pytest.raises(IntegrityFailure, match="part 1"):
        decode_index(encode_index([*index, Part(bytes(16), 5000, 0)]), 5000)


def test_a_file_that_is_held_needs_nothing_and_a_strange_one_everything() -> None:
    data, index = file_of([(1, 5000), (2, 5000)])
    assert missing_bytes([index], index) == 0
    assert missing([], index) == (Span(0, len(data)),)
