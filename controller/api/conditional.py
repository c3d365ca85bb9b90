"""Conditional and range requests, as RFC 9110 has them (sections 8.8.3, 13 and 14): pure functions over header values.

Our entity tags are always strong. What a header cannot mean is ignored where the RFC says so, never guessed: a
malformed Range is no Range, an If-Range that does not match exactly gives the whole.
"""

import re
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

RANGE_CHARS_MAX = 256
_ETAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*(?:,|$)')
_BYTE_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.IGNORECASE)

UNSATISFIABLE: Final = "unsatisfiable"


class ByteRange(msgspec.Struct, frozen=True):
    """Bytes from `offset`, `length` of them; length is at least 1."""

    offset: int
    length: int

    def content_range(self, size: int) -> str:
        """The Content-Range header for this part of `size` bytes."""
        return f"bytes {self.offset}-{self.offset + self.length - 1}/{size}"


def quote(tag: str) -> str:
    """The strong entity tag whose opaque part is `tag`."""
    return f'"{tag}"'


def matches_strongly(header: str | None, etag: str) -> bool:
    """Whether If-Match `header` names `etag` (strong comparison); `*` names anything that exists."""
    return _listed(header, etag, weak_counts=False)


def matches_weakly(header: str | None, etag: str) -> bool:
    """Whether If-None-Match `header` names `etag` (weak comparison)."""
    return _listed(header, etag, weak_counts=True)


def select_range(
    range_header: str | None, if_range: str | None, etag: str, size: int
) -> ByteRange | Literal["unsatisfiable"] | None:
    """The single range to send of `size` bytes; None for all of them, `UNSATISFIABLE` for 416.

    If-Range must be exactly our strong tag; a date never matches, because we send no Last-Modified. Several ranges at
    once are answered with the whole, which section 14.2 allows.
    """
    if range_header is None or len(range_header) > RANGE_CHARS_MAX:
        return None
    if if_range is not None and if_range.strip() != etag:
        return None
    match = _BYTE_RANGE.fullmatch(range_header.strip())
    if match is None:
        return None
    return _resolve(match[1], match[2], size)


def _resolve(first: str, last: str, size: int) -> ByteRange | Literal["unsatisfiable"] | None:
    if not first and not last:
        return None
    if not first:
        length = min(int(last), size)
        return ByteRange(size - length, length) if length else UNSATISFIABLE
    offset = int(first)
    if last and int(last) < offset:
        return None
    if offset >= size:
        return UNSATISFIABLE
    end = min(int(last), size - 1) if last else size - 1
    return ByteRange(offset, end - offset + 1)


def _listed(header: str | None, etag: str, *, weak_counts: bool) -> bool:
    if header is None:
        return False
    if header.strip() == "*":
        return True
    return any(quote(opaque) == etag for weak, opaque in _tags(header) if weak_counts or not weak)


def _tags(header: str) -> Iterator[tuple[str | None, str]]:
    """Weakness mark and opaque part of each listed tag, up to the first thing that is none."""
    at = 0
    while match := _ETAG.match(header, at):
        yield match[1], match[2]
        at = match.end()
