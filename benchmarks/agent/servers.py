"""Servers under test: each is a process tree of its own that serves one model file over HTTP.

Only the server whose turn it is runs; the others are stopped (SIGSTOP), because some of them use a core's time while
nobody asks them. The CPU time of a server is that of its whole tree, the ended children of it included.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, Self

import httpx
import msgspec
import psutil

from benchmarks.agent.models import BenchModel, Body
from benchmarks.report import ROOT

PEERS: Final = ROOT / ".demo" / "peers"
PROGRAMS: Final = Path(__file__).parent / "peers"
START_S: Final = 90.0
SETTLE_S_MAX: Final = 10.0
SETTLE_LOOK_S: Final = 0.25
SETTLED_SHARE: Final = 0.2
"""Of a core: some servers are never quite idle."""
OURS: Final = "ours"
NUMPY_NAMES: Final = {"FP32": "<f4", "INT64": "<i8", "INT32": "<i4"}


class Kind(NamedTuple):
    """A server that can be compared: how it is started and what it is sent."""

    name: str
    path: str
    body: str
    """The method of `BenchModel` that makes it."""


KINDS: Final = (
    Kind(OURS, "/v2/models/model/infer", "v2_binary"),
    Kind("fastapi", "/infer", "bare"),
    Kind("litserve", "/infer", "base64_json"),
    Kind("bentoml", "/infer", "bare"),
    Kind("mlserver", "/v2/models/model/infer", "v2_json"),
)


def installed(kind: Kind) -> bool:
    """Whether it can be started here."""
    return kind.name == OURS or (PEERS / kind.name / ".installed").exists()


class Server:
    """A running one. It is stopped (SIGSTOP) unless it is within `turn`."""

    def __init__(self, kind: Kind, model: BenchModel, log: Path) -> None:
        self.kind = kind
        self.body: Body = getattr(model, kind.body)()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}{kind.path}"
        self._log = log
        with log.open("wb") as output:
            command, environment = _command(kind, model, port)
            self._process = psutil.Popen(
                command, env=environment, cwd=PROGRAMS if kind.name != OURS else ROOT, stdout=output, stderr=output
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def wait_ready(self) -> None:
        """Return when it has answered; `TimeoutError` with the end of its log when it does not."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(self.url, content=self.body.data, headers=dict(self.body.headers), timeout=30)
                if answer.status_code == 200:
                    self._signal(stop=True)
                    return
            time.sleep(0.2)
        raise TimeoutError(f"{self.kind.name} does not answer: {self._log.read_text(errors='replace')[-2000:]}")

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """It runs for the time of the block."""
        self._signal(stop=False)
        try:
            yield
        finally:
            self._signal(stop=True)

    def settle(self) -> None:
        """Return when it does next to nothing: callers who left may have left it work, which is not the next ones'."""
        for _ in range(round(SETTLE_S_MAX / SETTLE_LOOK_S)):
            before = self.cpu_s()
            time.sleep(SETTLE_LOOK_S)
            if self.cpu_s() - before <= SETTLED_SHARE * SETTLE_LOOK_S:
                return

    def cpu_s(self) -> float:
        """User and system time of the tree until now, in seconds."""
        return float(sum(sum(process.cpu_times()[:4]) for process in self._tree()))

    def _signal(self, *, stop: bool) -> None:
        for process in self._tree():
            (process.suspend if stop else process.resume)()

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _command(kind: Kind, model: BenchModel, port: int) -> tuple[list[str], Mapping[str, str]]:
    if kind.name == OURS:
        inputs = msgspec.json.encode(model.declared).decode()
        return [sys.executable, "-m", "benchmarks.agent.ours", str(model.path), inputs, str(port)], os.environ
    python = PEERS / kind.name / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    tensors = [{**tensor, "dtype": NUMPY_NAMES[str(tensor["datatype"])]} for tensor in model.tensors]
    settings = {
        "PEER_MODEL": str(model.path),
        "PEER_PORT": str(port),
        "PEER_OTHER_PORT": str(_free_port()),
        "PEER_TENSORS": msgspec.json.encode(tensors).decode(),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    return [str(python), f"{kind.name}_app.py"], {**clean, **settings}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
