"""Keyset pages: a list is cut after a key, so that what is added or removed meanwhile shifts nothing."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from controller.resources import Page

T = TypeVar("T")


def page_of(found: Sequence[T], limit: int, key: Callable[[T], str]) -> Page[T]:
    """The first `limit` of `found`; one more than `limit` says that there is a next page."""
    items = tuple(found[:limit])
    return Page(items=items, next=key(items[-1]) if len(found) > limit else None)
