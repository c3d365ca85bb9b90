"""`ferry-agent` as its user meets it: what it prints, what it leaves on the disk, how it ends."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from common.trust import Signer
from common.wire import JoinString
from edge_agent.__main__ import EXIT_FAILURE, EXIT_USAGE, main
from edge_agent.identity import BrokerAccess, Identity, save_identity
from tests.conftest import eventually
from tests.integration.api_peer import serving


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of a device that has joined a fleet which cannot be reached now."""
    folder = tmp_path / "agent"
    folder.mkdir()
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
    save_identity(folder, identity)
    return folder


Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def ferry_agent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command that ends by itself, in this process: its status, stdout and stderr."""
    for name in [name for name in os.environ if name.startswith("FERRY_")]:
        monkeypatch.delenv(name)

    async def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = await asyncio.to_thread(_status_of, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def _status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


async def start(*arguments: str | Path) -> Process:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FERRY_")}
    command = (sys.executable, "-m", "edge_agent", *map(str, arguments))
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=environment)


@pytest.fixture
async def running(data: Path, tmp_path: Path) -> AsyncIterator[Process]:
    """An agent without any network, serving."""
    ready = tmp_path / "ready.json"
    process = await start("run", "--data", data, "--inference-listen", "127.0.0.1:0", "--ready-file", ready)
    await eventually(lambda: ready.exists() or process.returncode is not None, "the agent is ready")
    yield process
    if process.returncode is None:
        process.kill()
        await process.communicate()


async def test_join_prints_the_device_and_status_shows_it(ferry_agent: Command, tmp_path: Path) -> None:
    (tmp_path / "controller").mkdir()
    data = tmp_path / "new" / "agent"
    async with serving(tmp_path / "controller") as api:
        word = str(JoinString(api.url, await api.claim()))
        status, out, err = await ferry_agent(
            "join", word, "--data", data, "--name", "cam-7", "--label", "site=north", "--label", "line=a"
        )
        device = (await api.ask("GET", "/v1/devices/cam-7")).json()
        again = await ferry_agent("join", word, "--data", data)

    assert (status, out) == (0, "cam-7\n"), err
    assert device["labels"] == {"site": "north", "line": "a"}
    assert device["capabilities"]["patch_codecs"]
    assert again[0] == EXIT_FAILURE
    assert "--force" in again[2]
    status, out, _ = await ferry_agent("status", "--data", data, "-o", "json")
    assert status == 0
    assert json.loads(out) | {"controller_url": "", "broker_url": ""} == {
        "device": "cam-7",
        "controller_url": "",
        "broker_url": "",
        "running": False,
        "pid": None,
        "inference_url": None,
        "ready": False,
        "generation": 0,
        "not_modified": 0,
        "models": [],
    }


async def test_an_agent_without_a_network_serves_says_so_and_ends_on_sigterm(
    ferry_agent: Command, running: Process, data: Path, tmp_path: Path
) -> None:
    ready = json.loads((tmp_path / "ready.json").read_bytes())
    assert (ready["device"], ready["pid"]) == ("cam-1", running.pid)
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{ready['inference_url']}/v2/health/live") as response,
    ):
        assert response.status == 200
    status, out, _ = await ferry_agent("status", "--data", data)
    assert status == 0
    assert f"process {running.pid}, inference at {ready['inference_url']}" in out
    assert "no models yet" in out
    for second in (("run",), ("join", "--force", str(JoinString("http://127.0.0.1:9", "t")))):
        status, _, err = await ferry_agent(*second, "--data", data)
        assert status == EXIT_FAILURE
        assert f"process {running.pid}" in err

    running.send_signal(signal.SIGTERM)
    _, told = await running.communicate()

    assert running.returncode == 0, told.decode()
    assert not (tmp_path / "ready.json").exists()
    assert not (data / "run.json").exists()
    assert "not running" in (await ferry_agent("status", "--data", data))[1]


async def test_a_killed_agent_is_not_taken_for_running(ferry_agent: Command, running: Process, data: Path) -> None:
    running.kill()
    await running.communicate()

    assert (data / "run.json").exists()
    assert "not running" in (await ferry_agent("status", "--data", data))[1]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), EXIT_USAGE, "COMMAND"),
        (("join",), EXIT_USAGE, "JOIN_STRING"),
        (("join", "x", "--label", "site"), EXIT_USAGE, "KEY=VALUE"),
        (("join", "x"), EXIT_FAILURE, "does not look like a join string"),
        (("run",), EXIT_FAILURE, "has not joined a fleet"),
        (("status",), EXIT_FAILURE, "ferry-agent join"),
        (("run", "--poll-s", "soon"), EXIT_USAGE, "--poll-s: Expected `float`"),
        (("run", "--inference-listen", "8100"), EXIT_USAGE, "HOST:PORT"),
        (("run", "--config", "/nowhere.toml"), EXIT_USAGE, "cannot read"),
    ],
)
async def test_what_cannot_be_done_is_one_sentence_and_a_status(
    ferry_agent: Command, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    data = ("--data", str(tmp_path / "nothing")) if arguments else ()
    returned, out, err = await ferry_agent(*arguments, *data)

    assert (returned, out) == (status, "")
    assert said in err
    assert "Traceback" not in err


async def test_a_folder_that_cannot_be_written_is_told_as_such(ferry_agent: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    word = str(JoinString("http://127.0.0.1:9", "t"))
    status, _, err = await ferry_agent("join", word, "--data", tmp_path / "file" / "agent")

    assert status == EXIT_FAILURE
    assert "cannot write" in err


async def test_a_taken_port_is_told_as_such(data: Path) -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        process = await start("run", "--data", data, "--inference-listen", f"{host}:{port}")
        _, err = await process.communicate()

    assert process.returncode == EXIT_FAILURE
    assert str(port) in err.decode()
    assert "Traceback" not in err.decode()
