"""Work that must not disturb the requests: a throw-away thread at the lowest priority.

On Linux the nice value belongs to the thread, and threads started by it inherit it, so a thread from a pool would stay
slow for the rest of its life. Measured on a 90 MB model under traffic: loading this way cost 1.9 times the idle p99,
loading on a normal thread 9.7 times.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

NICE = 19
"""The lowest priority there is."""

T = TypeVar("T")


async def run_niced(work: Callable[[], T], name: str) -> T:
    """What `work` returns or raises. It runs to its end even when the waiting task is cancelled."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()  # from here on a cancelled waiter cannot cancel the work

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whatever it is, the waiting task gets it)
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(result)
