"""Who answers a request while a candidate is in probation beside the proven release. Pure: chance comes as a number.

What a request wishes comes first, then the key that it carries, then the share:

    >>> to_candidate(Split(share=0.1), Wish(), draw=0.05, salt="m@2")
    True
    >>> to_candidate(Split(share=0.1, header="x-model"), Wish(side="stable"), draw=0.05, salt="m@2")
    False

A key is hashed to a number from 0 to 1, so a caller stays on its side, and a wider share keeps those who were with the
candidate already. What a caller writes that is neither side is no wish: a split must not break an application.
"""

import hashlib
from collections.abc import Callable
from typing import Final, NamedTuple

from common.wire import Split

CANDIDATE: Final = "candidate"
STABLE: Final = "stable"


class Wish(NamedTuple):
    """What a request says of itself: the `side` that shall answer (`candidate` or `stable`), or a `key`; empty
    is nothing.
    """

    side: str = ""
    key: str = ""


NO_WISH: Final = Wish()


def wish_in(split: Split, look: Callable[[str], str]) -> Wish:
    """The wish of a request; `look` gives the value of a header or parameter by name, empty where there is none."""
    return Wish(look(split.header) if split.header else "", look(split.key) if split.key else "")


def to_candidate(split: Split, wish: Wish, draw: float, salt: str) -> bool:
    """Whether the candidate answers. `draw` is from [0, 1); `salt` names the trial, so that trials are not alike."""
    if wish.side in {CANDIDATE, STABLE}:
        return wish.side == CANDIDATE
    return (place(salt, wish.key) if wish.key else draw) < split.share


def place(salt: str, key: str) -> float:
    """Where a key stands in [0, 1)."""
    digest = hashlib.sha256(f"{salt}\n{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7]) / 2**56
