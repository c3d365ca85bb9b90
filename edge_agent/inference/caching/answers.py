"""Answers by owner and question, the least recently used given up first. Pure; not safe for threads.

An owner has a bound of its own, and all owners together have one. An answer larger than a quarter of what its owner may
keep is not kept: it would push out all others for one that may never be asked for again.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple

import numpy as np

from common.artifact.tensors import Array
from edge_agent.inference.caching.question import Question

ENTRY_BYTES: Final = 2048
"""What an entry is counted as beside its inputs and outputs: objects and the places in the tables."""
STRING_BYTES: Final = 64
"""The same for each string."""
SHARE_MAX: Final = 4
"""Every answer is at most one such part of what its owner may keep."""


class _Entry(NamedTuple):
    question: Question
    outputs: Mapping[str, Array]
    size: int
    used: int


class _Shelf:
    """One owner's entries, the least recently used first."""

    __slots__ = ("entries", "size")

    def __init__(self) -> None:
        self.entries: OrderedDict[int, _Entry] = OrderedDict()
        self.size = 0

    @property
    def oldest(self) -> int:
        """When the least recently used was used."""
        return next(iter(self.entries.values())).used


class Answers:
    """At most `bytes_max` bytes of answers, of all owners."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._shelves: dict[Hashable, _Shelf] = {}
        self._uses = 0
        self.size = 0
        """Bytes of all entries."""

    def get(self, owner: Hashable, question: Question) -> Mapping[str, Array] | None:
        """The answer that `owner` gave to an equal question, if it is still here."""
        shelf = self._shelves.get(owner)
        entry = shelf.entries.get(question.digest) if shelf else None
        if shelf is None or entry is None or entry.question != question:
            return None
        self._uses += 1
        shelf.entries[question.digest] = entry._replace(used=self._uses)
        shelf.entries.move_to_end(question.digest)
        return entry.outputs

    def put(self, owner: Hashable, question: Question, outputs: Mapping[str, Array], owner_bytes_max: int) -> bool:
        """Keep the answer, and at most `owner_bytes_max` of the owner's; whether it is kept. Others may have to go."""
        size = ENTRY_BYTES + question.size + sum(map(_size, outputs.values()))
        bound = min(owner_bytes_max, self._bytes_max)
        if size * SHARE_MAX > bound:
            return False
        shelf = self._shelves.setdefault(owner, _Shelf())
        if question.digest in shelf.entries:
            self._drop(shelf, question.digest)
        self._uses += 1
        shelf.entries[question.digest] = _Entry(question, outputs, size, self._uses)
        shelf.size += size
        self.size += size
        while shelf.size > bound:
            self._drop_oldest(owner)
        while self.size > self._bytes_max:
            self._drop_oldest(min(self._shelves, key=lambda one: self._shelves[one].oldest))
        return True

    def forget(self, owner: Hashable) -> None:
        """Give up all that `owner` answered."""
        shelf = self._shelves.pop(owner, None)
        if shelf:
            self.size -= shelf.size

    def held(self, owner: Hashable) -> tuple[int, int]:
        """How many answers of `owner` are kept, and their bytes."""
        shelf = self._shelves.get(owner)
        return (len(shelf.entries), shelf.size) if shelf else (0, 0)

    def _drop_oldest(self, owner: Hashable) -> None:
        shelf = self._shelves[owner]
        self._drop(shelf, next(iter(shelf.entries)))
        if not shelf.entries:
            del self._shelves[owner]

    def _drop(self, shelf: _Shelf, digest: int) -> None:
        size = shelf.entries.pop(digest).size
        shelf.size -= size
        self.size -= size


def _size(array: Array) -> int:
    if array.dtype != np.object_:
        return array.nbytes
    return array.nbytes + sum(STRING_BYTES + len(str(element).encode()) for element in array.flat)
