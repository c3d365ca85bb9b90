"""Stopping code that does not return: an exception raised in its thread, as far as Python can.

CPython delivers it between two byte codes (`PyThreadState_SetAsyncExc`). So a loop written in Python ends; code that
stays inside one call into C (a regular expression that runs for ever, a blocking read, a sleep) ends only when that
call returns, and code that catches `BaseException` and goes on does not end at all.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

from common.pipelines.step import StepFailed

T = TypeVar("T")

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in.argtypes = [ctypes.c_ulong, ctypes.py_object]
_raise_in.restype = ctypes.c_int
_forget = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)


class Stopped(BaseException):
    """Raised inside code that took too long; not an `Exception`, so that code which handles those does not keep it."""


class Guard:
    """Knows which threads are inside guarded code, and can end them there and nowhere else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[int] = set()

    def run(self, work: Callable[[], T], what: str) -> T:
        """What `work` returns or raises; `StepFailed`, which names `what`, when it was stopped."""
        thread = threading.get_ident()
        try:
            try:
                self._inside.add(thread)
                return work()
            finally:
                self._leave(thread)
        except Stopped as error:
            self._leave(thread)
            raise StepFailed(f"{what} took too long and was stopped") from error

    def stop(self, thread: int) -> None:
        """End the guarded code that `thread` is in; nothing happens if it is in none."""
        with self._lock:
            if thread in self._inside:
                _raise_in(thread, Stopped)

    def _leave(self, thread: int) -> None:
        """From here on nobody stops the thread; what was sent and has not arrived is taken back."""
        with self._lock:
            self._inside.discard(thread)
            _forget(thread, None)
