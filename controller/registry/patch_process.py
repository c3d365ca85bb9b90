"""Runs one `patch_worker` as a process: starts it, listens, ends it, and says what it has cost.

It never outlives the call, whatever happens to the caller. The CPU time is the kernel's own account of the process
(`wait4(2)`), so it is right also for one that was killed; that is why this is not `asyncio`'s own subprocess, which
throws the account away.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from asyncio import StreamReader
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import IO, NamedTuple

import msgspec

from common.errors import IntegrityFailure
from controller.registry.patch_worker import Order, Progress, Result

WALL_PER_CPU_MAX = 4.0
"""How many times its CPU limit a worker may take by the clock: beyond that it hangs, or the machine is overloaded."""
WALL_S_MIN = 60.0
COMPLAINT_BYTES_MAX = 4096
"""How much of what a broken worker said last is logged."""
ONE_THREAD_EACH = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""The matrices are small: threads of the matrix library would only wait for each other, and burn CPU while they do."""

logger = logging.getLogger(__name__)


class Ended(NamedTuple):
    """How a worker ended and the CPU seconds, user and system, that it took."""

    result: Result
    cpu_s: float


class _Exit(NamedTuple):
    status: int
    """The exit code, or minus the signal."""
    cpu_s: float


async def run_worker(order: Order, tell: Callable[[Progress], Awaitable[object]]) -> Ended:
    """Run a worker to its end; `tell` hears of its progress. What is wrong with the worker is in the result."""
    process = _start(order)
    exited = _exit_of(process)
    wall_s_max = max(WALL_S_MIN, WALL_PER_CPU_MAX * order.cpu_s_max)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(_end, process, exited)
        stdout, stderr = [await _reader(pipe, stack) for pipe in (process.stdout, process.stderr)]
        complaint = asyncio.create_task(_last_words(stderr))
        stack.callback(complaint.cancel)
        try:
            async with asyncio.timeout(wall_s_max):
                result = await _follow(stdout, tell)
                status, _ = await asyncio.shield(exited)
        except TimeoutError:
            result, status = Result("failed", reason=f"building took longer than {wall_s_max:.0f} s"), 0
        except IntegrityFailure as error:
            result, status = Result("failed", reason=error.message), 0
        await _end(process, exited)
        words = await complaint
    if result is None or status != 0:
        result = _broken(status, order, words)
    return Ended(result, exited.result().cpu_s)


def _start(order: Order) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "controller.registry.patch_worker", msgspec.json.encode(order)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        env={**os.environ, **ONE_THREAD_EACH},
    )  # fmt: skip


def _exit_of(process: "subprocess.Popen[bytes]") -> "asyncio.Future[_Exit]":
    """What the process leaves when it ends. A thread waits for it: nobody else may, or the account is lost."""
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[_Exit] = loop.create_future()

    def take(left: _Exit) -> None:
        if not exited.done():
            exited.set_result(left)

    def wait() -> None:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        left = _Exit(process.returncode, usage.ru_utime + usage.ru_stime)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(take, left)

    threading.Thread(target=wait, name="patch-worker-exit", daemon=True).start()
    return exited


async def _end(process: "subprocess.Popen[bytes]", exited: "asyncio.Future[_Exit]") -> None:
    """Kill the process if it still runs, and wait until it is gone."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)  # not `process.kill`, which might take the exit from the thread
    await asyncio.shield(exited)
    if process.stdin is not None:
        process.stdin.close()


async def _reader(pipe: IO[bytes] | None, stack: contextlib.AsyncExitStack) -> StreamReader:
    if pipe is None:
        raise RuntimeError("the patch worker was started without pipes")
    reader = StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    stack.callback(transport.close)
    return reader


async def _follow(stdout: StreamReader, tell: Callable[[Progress], Awaitable[object]]) -> Result | None:
    async for line in _lines(stdout):
        if isinstance(line, Result):
            return line
        await tell(line)
    return None


async def _lines(stdout: StreamReader) -> AsyncIterator[Progress | Result]:
    try:
        async for line in stdout:
            yield msgspec.json.decode(line, type=Progress | Result)
    except (msgspec.DecodeError, ValueError) as error:
        raise IntegrityFailure(f"the patch worker said something that is not ours: {error}") from error


async def _last_words(stderr: StreamReader) -> str:
    """What the process wrote to its standard error; only the end of it is kept."""
    words = b""
    while piece := await stderr.read(COMPLAINT_BYTES_MAX):
        words = (words + piece)[-COMPLAINT_BYTES_MAX:]
    return words.decode(errors="replace")


def _broken(status: int, order: Order, words: str) -> Result:
    if status == -signal.SIGXCPU:
        return Result("failed", reason=f"building took more than {order.cpu_s_max} CPU s (patch_build_cpu_s_max)")
    logger.error("the patch worker broke", extra={"status": status, "said": words})
    return Result("failed", reason=f"the worker broke with status {status}")
