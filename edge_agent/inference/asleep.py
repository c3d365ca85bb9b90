"""Models that are installed and not in memory: the first request wakes them, and others that come meanwhile wait too.

Whoever loads models is asked to (`ask_for`), and says how it went by a switch or by `failed`. Requests that wait are
bounded in number and time, and none of them is on a thread that runs inferences, so a model that takes long to load
holds up nobody else's. `awake` is called on the event loop, `awake_from_thread` on any other thread.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from typing import Final

from common.errors import DeadlineExceeded, FerryError, Unavailable
from common.ids import ModelName
from edge_agent.inference.placement import Asleep
from edge_agent.inference.requests import Overloaded

WAITERS_MAX: Final = 64
"""Requests that wait for one model; one more is refused at once."""
WAKE_S_MAX: Final = 60.0
"""A request waits for a load no longer than this, in seconds, whatever its own timeout is."""

__all__ = ["WAITERS_MAX", "WAKE_S_MAX", "Asleep", "Waking"]


class Waking:
    """Who waits for which model of those that are `asleep`. `ask_for` is called once for all who wait for a model."""

    def __init__(self, asleep: Collection[ModelName]) -> None:
        self._asleep = asleep
        self.ask_for: Callable[[ModelName], None] = lambda _: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[ModelName, asyncio.Future[None]] = {}
        self._waiters: Counter[ModelName] = Counter()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop on which models are put to sleep and woken."""
        if self._loop is None:
            raise AssertionError("nothing was put to sleep yet")
        return self._loop

    def sleeps(self, model: ModelName) -> None:
        """A model was put to sleep, on the running loop; those who wait already want it still."""
        self._loop = asyncio.get_running_loop()
        if model in self._waiting:
            self.ask_for(model)

    async def awake(self, model: ModelName, timeout_s: float | None) -> None:
        """Return when the model can answer. Raises `Overloaded`, `DeadlineExceeded`, or why it could not be loaded."""
        if model not in self._asleep:  # woken since it was found asleep
            return
        future = self._asked_for(model)
        if self._waiters[model] >= WAITERS_MAX:
            fix = "try again a little later"
            raise Overloaded(f"{WAITERS_MAX} requests wait for {model} to be loaded", fix=fix)
        self._waiters[model] += 1
        longest_s = WAKE_S_MAX if timeout_s is None else min(timeout_s, WAKE_S_MAX)
        try:
            await asyncio.wait_for(asyncio.shield(future), longest_s)
        except TimeoutError as error:
            fix = "allow more time, or try again a little later"
            raise DeadlineExceeded(f"{model} is being loaded and was not ready in time", fix=fix) from error
        finally:
            self._waiters[model] -= 1

    def wanted(self, model: ModelName) -> None:
        """Ask for a model for which nobody waits. From any thread."""

        def ask() -> None:
            if model in self._asleep:
                self._asked_for(model)

        self.loop.call_soon_threadsafe(ask)

    def _asked_for(self, model: ModelName) -> asyncio.Future[None]:
        """Done when the model can answer; it is asked for once."""
        future = self._waiting.get(model)
        if future is None:
            future = self._waiting[model] = self.loop.create_future()
            self.ask_for(model)
        return future

    def awake_from_thread(self, model: ModelName, timeout_s: float | None) -> None:
        """`awake` for a thread that may wait."""
        asyncio.run_coroutine_threadsafe(self.awake(model, timeout_s), self.loop).result()

    def woken(self, model: ModelName) -> None:
        """It answers from now on."""
        future = self._waiting.pop(model, None)
        if future and not future.done():
            future.set_result(None)

    def failed(self, model: ModelName, error: FerryError) -> None:
        """It could not be loaded: all who wait get `error`."""
        future = self._waiting.pop(model, None)
        if future and not future.done():
            future.set_exception(error)
            future.exception()  # nobody may be left to take it

    def close(self) -> None:
        """Nothing is loaded any more."""
        for model in list(self._waiting):
            self.failed(model, Unavailable("the inference server is stopping"))
