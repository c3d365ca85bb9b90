"""Live requests put to a candidate as well, where nobody waits for its answers.

A request that was answered is offered with its answer; what is taken is copied as far as its caller could still change
it, and waits for its turn. One thread of the lowest priority takes turns while a core is free and no request waits; one
that comes in then has its core at once, for the kernel takes it from the mirror. Nothing here can fail or hold up a
request: what finds no room, in number or bytes, is dropped and counted.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from common.artifact.tensors import Array, check_feeds
from common.clock import Clock
from common.errors import FerryError
from common.wire import Shadow, ShadowReport
from edge_agent.inference.agreement import Agreement, Compared, answers_agree
from edge_agent.inference.loaded import Loaded, Statistics
from edge_agent.inference.niced import NICE
from edge_agent.inference.requests import Inference, Request
from edge_agent.inference.tensors import bytes_of, non_finite
from edge_agent.inference.trial import Attempt, attempt

logger = logging.getLogger(__name__)

REQUESTS_MAX = 16
"""Mirrored requests that may wait for their turn."""
BYTES_MAX = 8 * 1024 * 1024
"""Of their inputs and answers, all together."""
LOOK_S = 0.01
"""Between two looks for a free core, while something waits."""


class Taken(NamedTuple):
    """A request that was answered in `live_s` seconds in the engine; `live` is None when it failed."""

    feeds: Mapping[str, Array]
    outputs: tuple[str, ...]
    live: Mapping[str, Array] | None
    live_s: float
    size: int


class Chances(NamedTuple):
    """What a mirror asks of its surroundings: whether a core is `free` and nobody waits, and a number from [0, 1)."""

    free: Callable[[], bool]
    draw: Callable[[], float]


class Mirror:
    """Puts a share of the offered requests to `candidate`, as `terms` say; `run_s_max` seconds for each at most.

    `offer`, `oversee` and `report` may be called from any thread.
    """

    def __init__(self, candidate: Loaded, terms: Shadow, chances: Chances, clock: Clock, run_s_max: float) -> None:
        self.candidate = candidate
        self._terms = terms
        self._chances = chances
        self._clock = clock
        self._run_s_max = run_s_max
        self._changed = threading.Condition()
        self._waiting: deque[Taken] = deque()
        self._bytes = 0
        self._sum = Agreement()
        self._dropped = 0
        self._closed = False
        self._last_at = 0.0
        self._running_since: float | None = None
        self._thread = threading.Thread(target=self._work, name=f"mirror-{candidate.model}", daemon=True)
        self._thread.start()

    def offer(self, request: Request, outcome: Inference | FerryError) -> None:
        """A request has been answered, and its caller has not been told yet."""
        if request.chosen.first.interface != self.candidate.interface or self._chances.draw() >= self._terms.share:
            return
        live = outcome.outputs if isinstance(outcome, Inference) else {}
        size = request.size + bytes_of(live.values())
        if not self._make_room(size):
            return
        try:
            feeds = {name: _kept(array) for name, array in request.feeds.items()}
            answer = {name: array.copy() for name, array in live.items()} if live else None
        except MemoryError:
            self._give_up(size)
            return
        with self._changed:
            self._waiting.append(Taken(feeds, tuple(request.outputs), answer, request.compute_s, size))
            self._changed.notify()

    def oversee(self) -> None:
        """End a run that has taken too long; whoever keeps the mirror asks for it now and again."""
        since = self._running_since
        if since is not None and self._clock.monotonic() - since > self._run_s_max and self._thread.ident:
            self.candidate.stop(self._thread.ident)

    def close(self) -> None:
        """Take no more, and drop what waits."""
        with self._changed:
            self._closed = True
            self._dropped += len(self._waiting)
            self._waiting.clear()
            self._changed.notify()

    def report(self) -> ShadowReport:
        """What was found so far."""
        with self._changed:
            return self._sum.report(self._dropped)

    def statistics(self) -> Statistics:
        """For `/stats`: what the candidate did with mirrored requests."""
        with self._changed:
            side, at = self._sum.candidate, self._last_at
        answered = side.requests - side.errors
        return Statistics(
            answered=answered,
            failed=side.errors,
            answered_s=side.seconds,
            failed_s=0.0,
            queue_s=0.0,
            compute_s=side.seconds,
            last_at=at,
        )

    def _make_room(self, size: int) -> bool:
        """Whether there is room for one more of `size` bytes, which is then taken."""
        with self._changed:
            room = len(self._waiting) < REQUESTS_MAX and self._bytes + size <= BYTES_MAX and not self._closed
            self._bytes += size if room else 0
            self._dropped += not room
            return room

    def _give_up(self, size: int) -> None:
        with self._changed:
            self._bytes -= size
            self._dropped += 1

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (taken := self._next()) is not None:
            try:
                self._compare(taken)
            except Exception:
                logger.exception("a mirrored request could not be compared")
                self._give_up(0)
            finally:
                self._running_since = None

    def _next(self) -> Taken | None:
        """The next request whose turn has come; None when there is nothing more to do."""
        with self._changed:
            while not self._closed:
                if self._waiting and self._chances.free():
                    taken = self._waiting.popleft()
                    self._bytes -= taken.size
                    return taken
                self._changed.wait(LOOK_S if self._waiting else None)
            return None

    def _compare(self, taken: Taken) -> None:
        if not self.candidate.pin():
            return  # it was given up meanwhile
        try:
            self._running_since = started_at = self._clock.monotonic()
            tried = self._try(taken)
            seconds = self._clock.monotonic() - started_at
        finally:
            self.candidate.unpin()
        self._running_since = None
        live = taken.live if taken.live is not None and non_finite(taken.live) is None else None
        agrees = live is not None and tried.good and answers_agree(self._terms, live, tried.outputs or {})
        one = Compared(None if live is None else taken.live_s, seconds if tried.good else None, agrees)
        with self._changed:
            self._sum = self._sum.plus(one)
            self._last_at = self._clock.now()

    def _try(self, taken: Taken) -> Attempt:
        try:
            check_feeds(self.candidate.inputs, taken.feeds)
        except FerryError as failure:
            return Attempt(failure=failure)
        return attempt(self.candidate, taken.feeds, taken.outputs)


def _kept(array: Array) -> Array:
    """`array`, or a copy if somebody could still write to it."""
    base: object = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    fixed = isinstance(base, bytes) or (isinstance(base, memoryview) and base.readonly)
    return array if fixed else array.copy()
