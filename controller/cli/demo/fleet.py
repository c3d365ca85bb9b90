"""The demo's machines: one controller and a few agents, each a real process with its own data folder.

Every process announces itself in a ready file once it serves. They are children of the demo and end with it, unless
they are to be kept.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import msgspec

from common.errors import Unavailable

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05
LOG_TAIL_BYTES = 2000


class Program:
    """One of our programs, started with a ready file."""

    def __init__(
        self, name: str, folder: Path, arguments: list[str], environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._arguments = arguments
        self._environment = {**os.environ, **(environment or {})}
        self._ready_file = folder / f"{name}.ready.json"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> dict[str, str]:
        """Start it and return its ready file; `Unavailable`, with the end of its log, if it does not come up."""
        self._ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = _spawn([*self._arguments, "--ready-file", str(self._ready_file)], log, self._environment)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise Unavailable(f"{self.name} did not start: {self._log_tail()}", fix=f"see {self.log}")
            time.sleep(POLL_S)
        ready: dict[str, str] = json.loads(self._ready_file.read_bytes())
        return ready

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that is not enough."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _log_tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()


def stop_all(programs: Collection[Program]) -> None:
    """Stop them at the same time: each takes its time to finish what is under way."""
    if programs:
        with ThreadPoolExecutor(len(programs)) as at_once:
            list(at_once.map(Program.stop, programs))


def _spawn(arguments: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops its children in order
    )


class Endpoint(msgspec.Struct, frozen=True):
    """Where the controller answers and the credential of its operator."""

    url: str
    broker_url: str
    token: str
    token_file: Path


class Fleet:
    """A controller and its agents below one folder."""

    def __init__(self, folder: Path, devices: tuple[str, ...], slow_device: str, slow_bytes_per_s: int) -> None:
        self.folder = folder
        self._controller = Program(
            "controller",
            folder,
            ["controller", "serve", "--data", str(folder / "controller"), "--listen", "127.0.0.1:0"],
            {
                "FERRY_POLL_S": "5",
                "FERRY_HEARTBEAT_S": "2",
                "FERRY_RECONCILE_S": "0.2",
                "FERRY_BROKER_LISTEN": "127.0.0.1:0",
            },
        )
        self.urls: dict[str, str] = {}
        """Where each agent serves inference."""
        self.agents = {name: self._agent(name, slow_bytes_per_s if name == slow_device else 0) for name in devices}

    def start_controller(self) -> Endpoint:
        """Start it and wait until it serves."""
        ready = self._controller.start()
        token_file = Path(ready["admin_token_file"])
        return Endpoint(ready["url"], ready["broker_url"], token_file.read_text().strip(), token_file)

    def join(self, device: str, join_string: str) -> None:
        """`ferry-agent join`, as on a new device."""
        command = [sys.executable, "-m", "edge_agent", "join", join_string]
        command += ["--data", str(self.data_of(device)), "--name", device, "--label", "site=demo"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{device} could not join: {done.stderr.strip()}")

    def start_agent(self, device: str) -> str:
        """Start the agent and return where it serves inference."""
        self.urls[device] = self.agents[device].start()["inference_url"]
        return self.urls[device]

    def data_of(self, device: str) -> Path:
        """The agent's data folder."""
        return self.folder / device

    def pids(self) -> dict[str, int]:
        """The process of each program."""
        return {program.name: program.pid for program in (self._controller, *self.agents.values())}

    def stop(self) -> None:
        """Agents first, so that their last words are heard."""
        stop_all(self.agents.values())
        self._controller.stop()

    def _agent(self, name: str, bytes_per_s: int) -> Program:
        arguments = ["edge_agent", "run", "--data", str(self.data_of(name)), "--inference-listen", "127.0.0.1:0"]
        environment = {"FERRY_AGENT_DOWNLOAD_RATE_BYTES_PER_S": str(bytes_per_s), "FERRY_AGENT_TELEMETRY_S": "2"}
        environment["FERRY_AGENT_DEFER_S_MAX"] = "0"  # what keeps this machine busy is the demo itself
        return Program(name, self.folder, arguments, environment)
