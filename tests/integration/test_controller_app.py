"""The whole controller: in this process, and as the program that operators start."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from common.errors import Conflict, InvalidInput
from common.ids import DeviceId
from common.wire import JoinString, Kind, Presence, ReportedState, Topic, encode
from controller.app import Controller
from controller.config import Settings
from tests.conftest import eventually
from tests.integration.mqtt_peer import Peer

FREE = "127.0.0.1:0"
CAPABILITIES = {"agent_version": "0"}


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**({"data": str(folder / "data"), "listen": FREE, "broker_listen": FREE} | changes))


@asynccontextmanager
async def running(chosen: Settings) -> AsyncIterator[Controller]:
    controller = Controller(chosen)
    await controller.start()
    try:
        yield controller
    finally:
        await controller.stop()


class Operator:
    """Talks to the API with the token of the first start."""

    def __init__(self, url: str, token_file: Path) -> None:
        headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"}
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=30)

    async def get(self, path: str) -> Any:
        return (await self.http.get(path)).raise_for_status().json()

    async def join(self, name: str) -> dict[str, Any]:
        """Have a device join; what it was given."""
        claim = (await self.http.post("/v1/join-tokens", json={})).raise_for_status().json()
        token = JoinString.parse(claim["join_string"]).token
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": f"join-{name}"}
        body = {"name": name, "capabilities": CAPABILITIES}
        answer: dict[str, Any] = (
            (await self.http.post("/v1/join", json=body, headers=headers)).raise_for_status().json()
        )
        return answer


def operator(controller: Controller) -> Operator:
    return Operator(controller.url, controller.admin_token_file)


def device_of(joined: dict[str, Any], client_id: str = "") -> Peer:
    access = joined["broker"]
    return Peer(int(access["url"].rpartition(":")[2]), access["username"], access["password"], client_id)


def birth(device: str, epoch: int = 1) -> bytes:
    return encode(Presence(device=DeviceId(device), epoch=epoch, seq=0, sent_at=0.0, online=True))


async def test_it_serves_and_says_how_it_is(tmp_path: Path) -> None:
    async with running(settings(tmp_path)) as controller:
        desk = operator(controller)
        await eventually(lambda: controller._health()["broker"] == "ok", "the link")
        health = await desk.get("/v1/health")
        assert health["status"] == "ok"
        assert {"broker", "store", "reconciler", "patches"} <= health["parts"].keys()
        text = (await desk.http.get("/metrics")).text
        assert 'http_route="/v1/health"' in text


async def test_a_device_joins_gets_its_order_and_is_seen_online(tmp_path: Path) -> None:
    async with running(settings(tmp_path)) as controller:
        desk = operator(controller)
        joined = await desk.join("press-1")
        assert joined["broker"]["url"] == controller.broker_url
        async with device_of(joined) as device:
            await device.receive_retained("fc/v1/d/press-1/desired")
            await device.publish(str(Topic(DeviceId("press-1"), Kind.STATE)), birth("press-1"), retain=True)

            async def online() -> bool:
                return bool((await desk.get("/v1/devices/press-1"))["presence"] == "online")

            await until(online, "the device is online")
        desired = await desk.http.get("/v1/devices/press-1/desired")
        assert desired.content == device.got[0].payload


async def test_everything_is_there_again_after_a_restart(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    async with running(chosen) as controller:
        first = operator(controller)
        joined = await first.join("press-1")
        places = (controller.url, controller.broker_url)
    async with running(chosen) as controller:
        assert (controller.url, controller.broker_url) == places
        assert [device["id"] for device in (await operator(controller).get("/v1/devices"))["items"]] == ["press-1"]
        async with device_of(joined) as device:
            assert not device.refusal
            await device.receive_retained("fc/v1/d/press-1/desired")


async def test_a_report_sent_while_the_controller_is_away_arrives_later(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    async with running(chosen) as controller:
        joined = await operator(controller).join("press-1")
        assert controller._link is not None
        await controller._link.stop()  # nobody listens from here on, the broker still does
        async with device_of(joined) as device:
            report = ReportedState(device=DeviceId("press-1"), epoch=1, seq=0, sent_at=0.0, generation=1)
            await device.publish("fc/v1/d/press-1/reported", encode(report))
    async with running(chosen) as controller:

        async def reported() -> bool:
            return bool((await operator(controller).get("/v1/devices/press-1"))["reported"])

        await until(reported, "the report")


async def test_orders_are_given_again_to_a_broker_that_lost_its_memory(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    async with running(chosen) as controller:
        joined = await operator(controller).join("press-1")
        async with device_of(joined) as device:
            await device.receive_retained("fc/v1/d/press-1/desired")
            order = device.got[0].payload
    remove_tree(tmp_path / "data/broker/jetstream")
    async with running(chosen), device_of(joined) as device:
        await device.receive_retained("fc/v1/d/press-1/desired")
        assert device.got[0].payload == order


async def test_without_its_broker_the_api_still_serves(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        broker = f"mqtt://_controller:secret@127.0.0.1:{unused.getsockname()[1]}"
        async with running(settings(tmp_path, broker=broker)) as controller:
            desk = operator(controller)
            health = await desk.get("/v1/health")
            assert (health["status"], health["parts"]["store"]) == ("degraded", "ok")
            assert "poll" in health["parts"]["broker"]
            joined = await desk.join("press-1")
            assert "secret" not in joined["broker"]["url"]
            headers = {"Authorization": f"Bearer {joined['device_token']}"}
            desired = await desk.http.get("/v1/devices/press-1/desired", headers=headers)
            assert desired.status_code == 200
            again = await desk.http.get(
                "/v1/devices/press-1/desired", headers={**headers, "If-None-Match": desired.headers["ETag"]}
            )
            assert again.status_code == 304


async def test_devices_of_an_external_mosquitto_are_written_down(tmp_path: Path) -> None:
    files = tmp_path / "mosquitto"
    chosen = settings(tmp_path, broker="mqtt://_controller:secret@127.0.0.1:1", mosquitto_files=str(files))
    async with running(chosen) as controller:
        await operator(controller).join("press-1")
    users = [line.partition(":")[0] for line in (files / "passwords").read_text().splitlines()]
    assert users == ["_controller", "press-1"]
    assert "pattern read fc/v1/d/%u/desired" in (files / "acl").read_text()


async def test_a_mosquitto_user_that_could_be_a_device_is_refused(tmp_path: Path) -> None:
    chosen = settings(tmp_path, broker="mqtt://admin:secret@127.0.0.1:1", mosquitto_files=str(tmp_path / "m"))
    with pytest.raises(InvalidInput, match=r"broker.*'admin' could be a device's"):
        await Controller(chosen).start()


async def test_a_second_controller_on_the_same_data_is_refused(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    async with running(chosen) as controller:
        with pytest.raises(Conflict, match=r"data: another controller uses .*--data"):
            await Controller(chosen).start()
        assert (await operator(controller).get("/v1/health"))["parts"]["store"] == "ok"


async def test_a_taken_port_is_named_and_everything_started_is_stopped(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Conflict, match=f"listen: the API's port {listen} is already in use .*--listen"):
            await Controller(settings(tmp_path, listen=listen)).start()
    assert not [child for child in psutil.Process().children() if "nats" in child.name()]
    async with running(settings(tmp_path)) as controller:
        assert (await operator(controller).get("/v1/health"))["parts"]["store"] == "ok"


async def test_a_lost_signing_key_is_not_replaced_behind_the_fleet_s_back(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    async with running(chosen) as controller:
        await operator(controller).join("press-1")
    key = tmp_path / "data/keys/signing.pem"
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(Conflict, match=r"signing\.pem is missing.*backup"):
        await Controller(chosen).start()
    key.write_bytes(kept)
    async with running(chosen):
        pass


async def test_secrets_are_readable_by_their_owner_only_and_a_deleted_token_is_replaced(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    async with running(chosen) as controller:
        for path in (controller.admin_token_file, tmp_path / "data/keys/signing.pem"):
            assert path.stat().st_mode & 0o077 == 0
        old_token = controller.admin_token_file.read_text()
    controller.admin_token_file.unlink()
    async with running(chosen) as controller:
        assert (await operator(controller).http.get("/v1/devices")).status_code == 200
        with_old = await httpx.AsyncClient().get(
            f"{controller.url}/v1/devices", headers={"Authorization": f"Bearer {old_token.strip()}"}
        )
        assert with_old.status_code == 401


# As a program


class Program:
    """`ferry-controller serve` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.ready_file = folder / "ready.json"
        self.arguments = ["serve", "--data", str(folder / "data"), "--ready-file", str(self.ready_file)]
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> dict[str, Any]:
        self.ready_file.unlink(missing_ok=True)
        self.process = process = self._spawn()
        await eventually(lambda: self.ready_file.exists() or process.poll() is not None, "the start", 60)
        ready: dict[str, Any] = json.loads(self.ready_file.read_bytes())
        return ready

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "controller", *self.arguments, "--listen", FREE, "--broker-listen", FREE]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    if program.process is not None and program.process.poll() is None:
        program.end(signal.SIGKILL)


async def test_the_program_serves_until_it_is_told_to_stop(program: Program) -> None:
    ready = await program.start()
    desk = Operator(ready["url"], Path(ready["admin_token_file"]))
    assert (await desk.get("/v1/health"))["parts"]["store"] == "ok"
    children = psutil.Process(ready["pid"]).children(recursive=True)
    assert children
    assert program.end(signal.SIGTERM) == 0
    assert not [child for child in children if child.is_running()]


async def test_a_killed_controller_loses_nothing_that_it_answered(program: Program) -> None:
    """Killed right after each answer, started again on the same data."""
    for number in range(2):
        ready = await program.start()
        desk = Operator(ready["url"], Path(ready["admin_token_file"]))
        joined = await desk.join(f"press-{number}")
        program.end(signal.SIGKILL)
    ready = await program.start()
    desk = Operator(ready["url"], Path(ready["admin_token_file"]))
    devices = [device["id"] for device in (await desk.get("/v1/devices"))["items"]]
    assert devices == ["press-0", "press-1"]
    async with device_of(joined) as device:
        await device.receive_retained("fc/v1/d/press-1/desired")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", "--broker", "mqtt://u:s3cret@h:port"], 2, "mqtt://USER:PASSWORD@HOST:PORT"),
        (["serve", "--data", "/proc/nowhere"], 2, "cannot use /proc/nowhere"),
        (["serve", "--database", "sqlite:///no/such/folder/x.db"], 2, "no/such/folder"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    places = {"FERRY_DATA": str(tmp_path / "data"), "FERRY_LISTEN": FREE, "FERRY_BROKER_LISTEN": FREE}
    command = [sys.executable, "-m", "controller", *arguments]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **places}, timeout=60)
    assert run.returncode == status
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert "s3cret" not in run.stderr


async def until(condition: Callable[[], Awaitable[bool]], what: str, within_s: float = 30.0) -> None:
    """`eventually` for a condition that must be awaited."""
    deadline = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < deadline, f"did not happen within {within_s} s: {what}"
        await asyncio.sleep(0.05)


def remove_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
