"""Whether memory holds one more session: beside what serves, only in place of the release before it, or not at all.

Pure: what is available is asked of a function that the shell brings. How much a release will take is estimated from the
size of its files and, as soon as one release of the model has been loaded, from what that one really took. The estimate
is of the worst moment: while a graph is optimised, its weights are in memory more than once.

    >>> room_for(need=300, available=500, reserve=100, freed=0).value
    'beside'
    >>> room_for(need=300, available=200, reserve=100, freed=250).value
    'instead'
    >>> room_for(need=300, available=200, reserve=100, freed=0).value
    'none'
"""

from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple

from common.errors import Unavailable
from common.ids import ModelName

MIB: Final = 1024 * 1024
SESSION_BYTES: Final = 16 * MIB
"""What a session takes whatever its size."""
UNKNOWN_FACTOR: Final = 3.0
"""Bytes for each byte of a model of which nothing was loaded yet; 1.7 to 3.4 were measured at 12 to 90 MB."""
KNOWN_BYTES_MIN: Final = MIB
"""What a smaller model took says nothing about a larger one: next to all of it is the session's own."""
LOADING_FACTOR: Final = 1.5
"""Bytes for each byte of a model that are in use while it is loaded, and not afterwards."""


class Room(Enum):
    """Where a candidate may be loaded."""

    BESIDE = "beside"
    INSTEAD = "instead"
    NONE = "none"


class Took(NamedTuple):
    """What a load left in memory, and the size of the files that were loaded; both in bytes."""

    size: int
    resident: int


class NoMemory(Unavailable):
    """The device has too little memory for one more session now; nothing was loaded."""

    code = "no_memory"


def room_for(*, need: int, available: int, reserve: int, freed: int) -> Room:
    """All in bytes: `freed` is what closing the release before it gives back, 0 without one."""
    if need <= available - reserve:
        return Room.BESIDE
    return Room.INSTEAD if freed and need <= available - reserve + freed else Room.NONE


def needed(size: int, before: Took | None) -> int:
    """About how many bytes loading `size` bytes of files takes at most."""
    if before is None or before.size < min(size, KNOWN_BYTES_MIN) or not before.size:
        return int(size * UNKNOWN_FACTOR) + SESSION_BYTES
    return int(before.resident * size / before.size + size * LOADING_FACTOR) + SESSION_BYTES


class Memory:
    """What is known of memory. `available` gives the bytes that programs could still get and `used` the bytes that this
    one has, each None where nobody knows: then nothing is refused.
    """

    def __init__(
        self, available: Callable[[], int | None], used: Callable[[], int | None], *, reserve_bytes: int
    ) -> None:
        self._available = available
        self._used = used
        self._reserve = reserve_bytes
        self._took: dict[ModelName, Took] = {}

    def used(self) -> int | None:
        """The bytes that this program has now: the mark for `learn`."""
        return self._used()

    def learn(self, model: ModelName, size: int, before: int | None) -> None:
        """A release of `size` bytes was loaded; `before` is what `used` said when that began."""
        now = self._used()
        if before is not None and now is not None and now > before:
            self._took[model] = Took(size, now - before)

    def room(self, model: ModelName, size: int, *, serving: int) -> Room:
        """Where a release of `size` bytes fits while one of `serving` bytes (0: none) of the same model serves."""
        available = self._available()
        if available is None:
            return Room.BESIDE
        took = self._took.get(model)
        freed = min(serving, took.resident) if took else serving
        return room_for(need=needed(size, took), available=available, reserve=self._reserve, freed=freed)

    def in_words(self, model: ModelName, size: int) -> str:
        """What is needed and what there is, as a sentence for the report."""
        need, available = needed(size, self._took.get(model)), self._available() or 0
        return (
            f"loading needs about {need // MIB} MiB of memory and {self._reserve // MIB} MiB are kept in reserve, "
            f"{available // MIB} MiB are available"
        )
