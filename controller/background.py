"""Loops that must not end: each runs as a task; one that dies is logged and started again with backoff.

A bug in one loop (a rollout that cannot be planned) then costs retries and a red health check, not the controller.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from common.backoff import Backoff

RESTART = Backoff(base_s=0.5, cap_s=60.0)
STEADY_S = 120.0
"""A loop that ran this long was healthy: its next restart is not held back by earlier ones."""

_log = logging.getLogger(__name__)


class Background:
    """The loops of one program."""

    def __init__(self, uniform: Callable[[], float] = random.random) -> None:
        self._uniform = uniform
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._troubles: dict[str, str] = {}

    def keep_running(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run `loop` until `stop`, starting it again whenever it raises or returns."""
        self._tasks[name] = asyncio.create_task(self._run(name, loop), name=name)

    def health(self) -> dict[str, str]:
        """For each loop "ok", or why it is being started again."""
        return {name: self._troubles.get(name, "ok") for name in self._tasks}

    async def stop(self) -> None:
        """Cancel all loops and wait for their ends."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    async def _run(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        attempt = 0
        while True:
            began = asyncio.get_running_loop().time()
            recovered = asyncio.get_running_loop().call_later(STEADY_S, self._troubles.pop, name, None)
            try:
                await loop()
                self._troubles[name] = "ended"
            except Exception as error:  # noqa: BLE001  whatever it was, the other loops go on
                self._troubles[name] = f"failed: {type(error).__name__}"
                _log.exception("a background loop failed; starting it again", extra={"loop": name})
            finally:
                recovered.cancel()
            attempt = 0 if asyncio.get_running_loop().time() - began > STEADY_S else attempt
            await asyncio.sleep(RESTART.delay_s(attempt, self._uniform()))
            attempt += 1
