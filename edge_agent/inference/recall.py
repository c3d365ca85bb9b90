"""The answers that releases keep for equal requests, for all threads: what is looked up, what is kept, what is counted.

A release owns what it answered. So a swap never serves the old release's answer, the old one's are there again after a
roll back, and a closed release's are gone. Only good answers come here (see `edge_agent.inference.answering`).

A hit is no inference: it takes no core and says nothing about the release's health.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Final

from common.artifact.tensors import Array
from common.clock import Clock
from edge_agent.inference.caching import SHARE_MAX, Answers, Question, frozen
from edge_agent.inference.loaded import Loaded

QUESTION_BYTES_MAX: Final = 8 * 1024 * 1024
"""Larger inputs are not looked up: hashing and comparing them takes milliseconds, for coroutines on the event loop."""
CACHE_BYTES_MAX: Final = 64 * 1024 * 1024


class Recall:
    """Answers of all releases, `bytes_max` together. Safe for threads."""

    def __init__(self, clock: Clock, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._answers = Answers(bytes_max)
        self._bytes_max = bytes_max
        self._clock = clock
        self._lock = threading.Lock()

    def question(self, loaded: Loaded, feeds: Mapping[str, Array], outputs: Sequence[str]) -> Question | None:
        """The request as something to look up; None if the release keeps no answers, or none to so large inputs."""
        bound = min(loaded.serving.cache_bytes, self._bytes_max) // SHARE_MAX
        if not bound or sum(array.nbytes for array in feeds.values()) > min(bound, QUESTION_BYTES_MAX):
            return None
        return Question(feeds, outputs)

    def find(self, loaded: Loaded, question: Question, since: float) -> dict[str, Array] | None:
        """The answer that the release gave to an equal question. `since` is when looking began (monotonic seconds)."""
        with self._lock:
            outputs = self._answers.get(loaded, question)
        seconds = self._clock.monotonic() - since
        loaded.looked_up(hit=outputs is not None, seconds=seconds, now=self._clock.now())
        return None if outputs is None else dict(outputs)

    def keep(self, loaded: Loaded, question: Question, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """`outputs`, read-only, which equal questions to this release get from now on."""
        own = frozen(outputs)
        with self._lock:
            self._answers.put(loaded, question, own, loaded.serving.cache_bytes)
        return dict(own)

    def held(self, loaded: Loaded) -> tuple[int, int]:
        """How many answers of the release are kept, and their bytes."""
        with self._lock:
            return self._answers.held(loaded)

    def forget_when(self, closed: "Future[None]", loaded: Loaded) -> None:
        """Give up the release's answers as soon as it is closed, when no request can add one any more."""

        def forget(_: object) -> None:
            with self._lock:
                self._answers.forget(loaded)

        closed.add_done_callback(forget)
