"""What a service manager hears of the agent, on a real notification socket: systemd's end of sd_notify(3)."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from common.clock import SystemClock
from common.trust import Signer
from edge_agent.identity import BrokerAccess, Identity, save_identity
from edge_agent.inference.engine import Beside
from edge_agent.supervisor import MESSAGE_BYTES_MAX, Supervisor
from edge_agent.watchdog import Pulse, Watchdog, Watched, starting
from tests.conftest import eventually
from tests.integration.small_models import MODEL, Bench, X, Y, adder

WATCHDOG_S = 0.1
SILENCE_S = 6 * WATCHDOG_S


class Manager:
    """The service manager's end: the messages that came, one string of lines each."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
        self.messages: list[str] = []
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._line.bind("\0" + address[1:] if address.startswith("@") else address)
        self._line.setblocking(False)

    def hear(self) -> list[str]:
        """Everything that has come so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages.append(self._line.recv(2 * MESSAGE_BYTES_MAX).decode())
        return self.messages

    def lines(self) -> list[str]:
        return [line for message in self.hear() for line in message.splitlines()]

    def feeds(self) -> int:
        return self.lines().count("WATCHDOG=1")

    def forget(self) -> None:
        self.hear()
        self.messages.clear()

    async def is_fed(self) -> None:
        """Return when two more feeds have come; one may have been under way."""
        before = self.feeds()
        await eventually(lambda: self.feeds() >= before + 2, "the watchdog is fed")

    async def is_starved(self) -> None:
        """Return when no feed has come for many periods."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            before = self.feeds()
            await asyncio.sleep(SILENCE_S)
            if self.feeds() == before:
                return
        pytest.fail("the watchdog is still fed")

    def close(self) -> None:
        self._line.close()


@pytest.fixture
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    abstract = getattr(request, "param", "path") == "abstract"
    manager = Manager(f"@ferry-test-{os.getpid()}" if abstract else str(tmp_path / "notify"))
    yield manager
    manager.close()


@pytest.fixture
async def agent(manager: Manager, tmp_path: Path) -> AsyncIterator[Process]:
    """An agent without a network, as a service manager starts it."""
    data = tmp_path / "agent"
    data.mkdir()
    identity = Identity(
        device="cam-1",  # type: ignore[arg-type]  # a literal id
        device_token="t",
        controller_url="http://127.0.0.1:9",
        broker=BrokerAccess(url="mqtt://127.0.0.1:9", username="cam-1", password="p"),
        client_id="cam-1-x",
        signing_keys=(Signer.generate().public_key,),
        heartbeat_s=15.0,
        poll_s=60.0,
    )
    save_identity(data, identity)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FERRY_")}
    command = (sys.executable, "-m", "edge_agent", "run", "--data", str(data), "--inference-listen", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(*command, stderr=PIPE, env=inherited | manager.environment)
    yield process
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
async def test_the_manager_hears_when_the_agent_serves_how_it_is_and_when_it_stops(
    manager: Manager, agent: Process
) -> None:
    await eventually(lambda: "READY=1" in manager.lines(), "it says that it is ready")
    before_ready = manager.lines()[: manager.lines().index("READY=1")]
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in before_ready)
    await manager.is_fed()
    assert "STATUS=cam-1 serves no model yet; no connection to the broker" in manager.lines()

    agent.send_signal(signal.SIGTERM)
    await agent.communicate()

    lines = manager.lines()
    assert agent.returncode == 0
    assert "WATCHDOG=1" not in lines[lines.index("STOPPING=1") :]


async def test_a_process_that_hangs_stops_feeding_and_goes_on_when_it_does_not(
    manager: Manager, agent: Process
) -> None:
    await manager.is_fed()
    agent.send_signal(signal.SIGSTOP)
    await manager.is_starved()
    agent.send_signal(signal.SIGCONT)
    await manager.is_fed()


async def test_a_loop_that_is_stuck_in_one_callback_feeds_nobody(manager: Manager) -> None:
    """The agent's loop is a thread's here, so that the test can block it and look on."""
    stuck, blocked = threading.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def live() -> None:
        loops.append(asyncio.get_running_loop())
        await Watchdog(Supervisor(manager.environment), watched(), SystemClock()).watch()

    def block() -> None:
        blocked.set()
        stuck.wait(60)

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(live())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        await manager.is_fed()
        loops[0].call_soon_threadsafe(block)
        await asyncio.to_thread(blocked.wait, 30)
        await manager.is_starved()
        stuck.set()
        await manager.is_fed()
    finally:
        stuck.set()
        loops[0].call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loops[0])])
        thread.join(30)


def watched(*pulses: Pulse, ended: list[str] | None = None) -> Watched:
    return Watched(pulses, ended=lambda: ended or [], sentence=lambda: "as it should be")


def inference_pulse(bench: Bench, stall_s: float = 0.5) -> Pulse:
    return Pulse("inference threads", bench.server.pulse, lambda: bench.server.finished, stall_s)


@contextlib.asynccontextmanager
async def watching(manager: Manager, watched: Watched) -> AsyncIterator[None]:
    task = asyncio.create_task(Watchdog(Supervisor(manager.environment), watched, SystemClock()).watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_inference_threads_that_never_come_back_starve_the_watchdog(manager: Manager, tmp_path: Path) -> None:
    bench = Bench(tmp_path, workers=2)
    await bench.add(1)
    async with watching(manager, watched(inference_pulse(bench))):
        await manager.is_fed()
        bench.engine.open.clear()
        stuck = [asyncio.create_task(bench.ask()) for _ in range(2)]
        await manager.is_starved()
        assert "inference threads silent" in manager.lines()[-1]
        bench.engine.open.set()
        await asyncio.gather(*stuck)
        await manager.is_fed()
    await bench.server.close()


async def test_a_model_that_loads_for_long_and_a_free_thread_beside_a_busy_one_are_no_hang(
    manager: Manager, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, workers=2)
    await bench.add(1)
    loading, may_load = threading.Event(), threading.Event()
    load = bench.engine.load

    def slowly(path: Path, beside: Beside) -> object:
        loading.set()
        assert may_load.wait(60)
        return load(path, beside)

    bench.engine.load = slowly  # type: ignore[method-assign,assignment]  # a disk that takes its time
    async with watching(manager, watched(inference_pulse(bench))):
        prepared = asyncio.create_task(bench.server.prepare(MODEL, "2", adder(tmp_path / "2.onnx", 2), X, Y))  # type: ignore[arg-type]
        bench.engine.open.clear()
        busy = asyncio.create_task(bench.ask())
        await eventually(lambda: loading.is_set() and bench.engine.arrived, "a load and a request are under way")
        manager.forget()
        await asyncio.sleep(SILENCE_S)
        await manager.is_fed()
        assert not [line for line in manager.lines() if "hung" in line]
        bench.engine.open.set()
        may_load.set()
        await asyncio.gather(prepared, busy)
    await bench.server.discard(prepared.result())
    await bench.server.close()


async def test_a_queue_that_moves_is_no_hang_however_long_it_is(manager: Manager, tmp_path: Path) -> None:
    """One thread, and a pulse at the end of the queue that gets its turn long after the stall time."""
    bench = Bench(tmp_path, workers=1)
    await bench.add(1)
    done = False

    async def callers() -> None:
        while not done:
            await bench.ask()

    never = Pulse("inference threads", asyncio.Event().wait, lambda: bench.server.finished, 0.3)
    async with watching(manager, watched(never)):
        calling = [asyncio.create_task(callers()) for _ in range(4)]
        await asyncio.sleep(SILENCE_S)
        manager.forget()
        await manager.is_fed()
        assert not [line for line in manager.lines() if "hung" in line]
        done = True
        await asyncio.gather(*calling)
        await manager.is_starved()
    await bench.server.close()


async def test_a_loop_that_ended_starves_the_watchdog_and_is_named(manager: Manager) -> None:
    ended: list[str] = []
    async with watching(manager, Watched((), ended=lambda: ended, sentence=lambda: "fine")):
        await manager.is_fed()
        ended.append("loop of reports")
        await manager.is_starved()
        assert manager.lines()[-1] == "STATUS=hung: loop of reports has ended"


async def test_a_long_start_asks_for_time(manager: Manager) -> None:
    async with starting(Supervisor(manager.environment)):
        await eventually(lambda: "EXTEND_TIMEOUT_USEC=60000000" in manager.lines(), "it asks for time")


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, None),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "30000000"}, 30.0),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "often"}, None),
        ({"NOTIFY_SOCKET": "vsock:2:1", "WATCHDOG_USEC": "30000000"}, None),
    ],
)
def test_the_watchdogs_time_is_read_as_systemd_says(environment: dict[str, str], watchdog_s: float | None) -> None:
    assert Supervisor(environment, pid=7).watchdog_s == watchdog_s


def test_a_manager_that_does_not_listen_stops_nothing(tmp_path: Path) -> None:
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell("READY=1")
    Supervisor({}).tell("READY=1")
