"""Whether requests of different lengths run together for one release, as learned from those that came.

The release allows it; whether the padding changes answers is seen on real requests, which are answered one by one and
then run once more together. After `PADDED_TRIALS` trials of an output without a difference requests for it are padded;
after the first one with a difference none is ever again, and the reason is kept. Every `LOOK_AGAIN_AFTER`th time it is
tried anew: a difference may show on some inputs only.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from common.artifact import TensorSpec
from common.artifact.padding import check_padding
from common.artifact.serving import Padding
from common.artifact.tensors import Array
from common.errors import InvalidInput
from edge_agent.inference.scheduling.padding import Cuts, Padder, cut_back, cuts_of
from edge_agent.inference.scheduling.rows import agree

logger = logging.getLogger(__name__)

PADDED_TRIALS: Final = 3
LOOK_AGAIN_AFTER: Final = 256
"""Batches of different lengths between two that are tried again."""


class Lengths:
    """What is known about padding one release's requests. Safe for threads."""

    def __init__(self, padding: Mapping[str, Padding], inputs: tuple[TensorSpec, ...], *, batched: bool) -> None:
        self._lock = threading.Lock()
        self._passed: Counter[str] = Counter()
        self._asked = 0
        self._cuts: Cuts = {}
        self.padder = Padder(padding) if padding else None
        self.flaw = ""
        if padding:
            self._check(padding, inputs, batched)

    @property
    def used(self) -> bool:
        """Whether requests of different lengths may be tried together, or are."""
        return self.padder is not None and not self.flaw

    @property
    def standing(self) -> str:
        """In words, for people; empty when the release says nothing of padding."""
        if self.padder is None:
            return ""
        if self.flaw:
            return f"off: {self.flaw}"
        passed = max(self._passed.values(), default=0)
        return "used" if passed >= PADDED_TRIALS else f"on trial, {passed} of {PADDED_TRIALS} passed"

    def trusted(self, outputs: Iterable[str]) -> bool:
        """Whether a batch of different lengths may be answered padded for these `outputs`; now and then it may not, to
        look again.
        """
        with self._lock:
            if not self.used or any(self._passed[name] < PADDED_TRIALS for name in outputs):
                return False
            self._asked += 1
            return self._asked % LOOK_AGAIN_AFTER != 0

    def cut(self, outputs: Mapping[str, Array], length: int) -> dict[str, Array]:
        """The padded request's outputs, cut back."""
        return cut_back(outputs, self._cuts, length)

    def compare(self, alone: Mapping[str, Array], padded: Mapping[str, Array], length: int, longest: int) -> str:
        """How the answer to a padded request differs from what came out alone; empty if it does not."""
        if length < longest:
            cuts = cuts_of(alone, padded, length, longest)
            with self._lock:
                if cuts is None or any(self._cuts.get(name, axis) != axis for name, axis in cuts.items()):
                    return f"a request of length {length} gets outputs of another shape when it is padded to {longest}"
                self._cuts |= cuts
        if not agree(cut_back(padded, self._cuts, length), alone):
            return f"a request of length {length} is answered otherwise when it is padded to {longest}"
        return ""

    def tried(self, outputs: Iterable[str], difference: str) -> None:
        """A batch of different lengths was tried for `outputs`; `difference` is empty when it changed no answer."""
        if difference:
            return self._give_up(difference)
        with self._lock:
            return self._passed.update(outputs)

    def _check(self, padding: Mapping[str, Padding], inputs: tuple[TensorSpec, ...], batched: bool) -> None:
        try:
            check_padding(padding, inputs)
        except InvalidInput as error:
            return self._give_up(str(error))
        return None if batched else self._give_up("the first axis of some input or output is not open")

    def _give_up(self, reason: str) -> None:
        self.flaw = reason
        logger.warning("requests are not padded: %s", reason)
