"""Long work in a thread that can be called off."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Superseded(Exception):
    """The work in a thread is not wanted any more."""


async def in_thread(work: Callable[[Callable[[], None]], T]) -> T:
    """`work`'s result from a thread; it is given a check that raises when the result is not wanted any more.

    On cancellation the thread is told, and has ended when this returns.
    """
    unwanted = threading.Event()

    def check() -> None:
        if unwanted.is_set():
            raise Superseded

    running = asyncio.ensure_future(asyncio.to_thread(work, check))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        unwanted.set()
        await asyncio.gather(running, return_exceptions=True)
        raise
