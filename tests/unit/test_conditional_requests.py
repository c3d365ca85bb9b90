"""Entity tags and ranges as pure functions (RFC 9110, sections 8.8.3, 13.1 and 14)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.api.conditional import UNSATISFIABLE, ByteRange, matches_strongly, matches_weakly, select_range

ETAG = '"sha256:ab"'


@pytest.mark.parametrize(
    ("header", "strong", "weak"),
    [
        (None, False, False),
        ("", False, False),
        ("*", True, True),
        (ETAG, True, True),
        (f"W/{ETAG}", False, True),
        (f'"x", {ETAG}', True, True),
        (f'"x,{ETAG}', False, False),
        ("sha256:ab", False, False),
        ('"x"', False, False),
    ],
)
def test_a_header_names_a_tag_or_does_not(header: str | None, strong: bool, weak: bool) -> None:
    assert matches_strongly(header, ETAG) is strong
    assert matches_weakly(header, ETAG) is weak


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_a_range_from_first_to_last_is_what_slicing_gives(size: int, first: int, last: int) -> None:
    data = bytes(range(size))
    selected = select_range(f"bytes={first}-{last}", None, ETAG, size)
    if last < first:
        assert selected is None
    elif first >= size:
        assert selected == UNSATISFIABLE
    else:
        assert isinstance(selected, ByteRange)
        assert data[selected.offset : selected.offset + selected.length] == data[first : last + 1]


@given(st.integers(0, 50), st.integers(0, 60))
def test_a_suffix_is_the_end(size: int, length: int) -> None:
    data = bytes(range(size))
    selected = select_range(f"bytes=-{length}", None, ETAG, size)
    if size == 0 or length == 0:
        assert selected == UNSATISFIABLE
    else:
        assert isinstance(selected, ByteRange)
        assert data[selected.offset : selected.offset + selected.length] == data[-length:]


@given(st.text(max_size=300), st.none() | st.text(max_size=40), st.integers(0, 2**40))
def test_any_header_gives_a_range_inside_or_none(header: str, if_range: str | None, size: int) -> None:
    selected = select_range(header, if_range, ETAG, size)
    if isinstance(selected, ByteRange):
        assert selected.length >= 1
        assert 0 <= selected.offset <= size - selected.length


@given(st.text(max_size=200))
def test_any_header_can_be_compared(header: str) -> None:
    if matches_strongly(header, ETAG):
        assert matches_weakly(header, ETAG)
