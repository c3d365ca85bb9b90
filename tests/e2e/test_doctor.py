"""`ferry-agent doctor` on real devices: it finds nothing on a healthy one, and names what was broken on another."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest

from common.trust import Signer
from controller.rollouts.model import RolloutState
from edge_agent.config import AgentSettings
from edge_agent.doctor import probing
from edge_agent.doctor.probing import examine
from edge_agent.identity import BrokerAccess, Identity, load_identity, save_identity
from edge_agent.telemetry.spool import Spool
from tests.e2e.world import World, until

pytestmark = pytest.mark.e2e

CONTENT = Path(__file__).read_bytes()


def doctor(data: Path) -> tuple[int, dict[str, tuple[str, str]]]:
    """Its exit status, and for each check the worst verdict with its detail."""
    command = [sys.executable, "-m", "edge_agent", "doctor", "--data", str(data), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    severity = ("ok", "warning", "problem")
    findings = sorted(document["findings"], key=lambda finding: severity.index(finding["verdict"]))
    assert all(finding["fix"] for finding in findings if finding["verdict"] != "ok")
    return done.returncode, {finding["check"]: (finding["verdict"], finding["detail"]) for finding in findings}


def verdicts(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {check: verdict for check, (verdict, _) in found.items() if verdict != "ok"}


def test_a_healthy_device_is_well_and_does_not_notice_the_visit(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one")
    world.roll_out("1", real_models[0])
    epoch = world.device("one").presence
    status, found = doctor(world.folder / "one")
    assert (status, verdicts(found)) == (0, {}), found
    assert set(found) == {
        "data folder", "identity", "journal", "runtime", "patches", "memory", "agent", "models", "telemetry",
        "controller", "clock", "broker",
    }  # fmt: skip
    assert "1 release on the disk" in found["models"][1]
    assert (epoch, world.device("one").presence) == ("online", "online"), "its line to the broker is as it was"
    log = world.agents["one"].log.read_text()
    assert log.count("connected to the broker") == 1, "and was not cut"


def test_a_release_that_was_taken_back_is_told_with_its_reason(
    world: World, real_models: tuple[Path, Path], broken: Path
) -> None:
    world.add_device("one")
    world.roll_out("1", real_models[1])
    rollout = world.begin(world.publish("2", broken), probation_s=60.0)
    until(lambda: next(world.client.executions(rollout)).state == "probation", "it is on trial", world)
    until(lambda: [world.answer("one", CONTENT) for _ in range(5)] and world.running("one") == "1", "taken back", world)
    world.finish(rollout, RolloutState.ROLLED_BACK)
    status, found = doctor(world.folder / "one")
    assert status == 0, "the device is well; the release was not"
    assert verdicts(found) == {"quarantine": "warning"}
    assert "content-type@2 failed here and is not tried again" in found["quarantine"][1]


def test_damage_on_the_disk_is_found(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one")
    world.roll_out("1", real_models[0])
    world.agents["one"].stop()
    data = world.folder / "one"
    (model,) = data.glob("models/content-type/*/*.onnx")
    with model.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\xff" * 64)
    (data / "identity.json").chmod(0o644)
    status, found = doctor(data)
    assert status == 1
    assert verdicts(found) == {"identity": "problem", "agent": "problem", "models": "problem"}
    assert "content-type@1" in found["models"][1]
    (data / "journal.db").write_bytes(b"no database" * 1000)
    for extra in data.glob("journal.db-*"):
        extra.unlink()
    (data / "telemetry.db").write_bytes(b"no database" * 1000)
    assert {"journal": "problem", "telemetry": "warning"}.items() <= verdicts(doctor(data)[1]).items()


def test_a_fleet_that_is_gone_or_does_not_know_the_device_is_told_apart(world: World, tmp_path: Path) -> None:
    world.add_device("one")
    world.agents["one"].stop()
    data = world.folder / "one"
    identity = load_identity(data)
    broker = msgspec.structs.replace(identity.broker, password="wrong")
    save_identity(data, msgspec.structs.replace(identity, device_token="wrong", broker=broker))
    found = doctor(data)[1]
    assert found["controller"][0] == found["broker"][0] == "problem"
    assert "does not know this device" in found["controller"][1]
    assert "refused this device" in found["broker"][1]
    save_identity(data, identity)
    world.controller.stop()
    found = doctor(data)[1]
    assert found["controller"][0] == found["broker"][0] == "problem"
    assert "cannot be reached" in found["controller"][1]
    assert "no connection to the broker" in found["broker"][1]


def test_a_device_that_has_not_joined_is_told_to() -> None:
    status, found = doctor(Path("/nowhere/at/all"))
    assert status == 1
    assert verdicts(found) == {"data folder": "problem"}


@contextmanager
def controller_with_a_clock(ahead_s: float) -> Iterator[str]:
    """Another machine whose clock is ahead of ours, as far as HTTP shows it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def identity() -> Identity:
    """A member of a fleet that is not there."""
    return Identity(
        device="one",  # type: ignore[arg-type]  # a literal id
        device_token="t",
        controller_url="http://127.0.0.1:9",
        broker=BrokerAccess(url="mqtt://127.0.0.1:9", username="one", password="p"),
        client_id="one-x",
        signing_keys=(Signer.generate().public_key,),
        heartbeat_s=15.0,
        poll_s=60.0,
    )


@pytest.mark.parametrize(("ahead_s", "verdict"), [(0.0, "ok"), (60.0, "warning"), (-7200.0, "problem")])
def test_a_wrong_clock_is_measured_against_the_controllers(identity: Identity, ahead_s: float, verdict: str) -> None:
    with controller_with_a_clock(ahead_s) as url:
        moved = msgspec.structs.replace(identity, controller_url=url)
        found = asyncio.run(probing._controller(moved, AgentSettings()))
    assert [finding.verdict for finding in found] == ["ok", verdict]


async def test_peers_that_take_the_call_and_say_nothing_do_not_hold_the_doctor_up(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "CONTROLLER_S", 0.3)
    monkeypatch.setattr(probing, "BROKER_S", 0.3)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    broker = msgspec.structs.replace(identity.broker, url=f"mqtt://127.0.0.1:{port}")
    save_identity(tmp_path, msgspec.structs.replace(identity, controller_url=f"http://127.0.0.1:{port}", broker=broker))
    async with server:
        found = {finding.check: finding for finding in await examine(AgentSettings(data=tmp_path))}
    assert found["controller"].verdict == found["broker"].verdict == "problem"
    assert "no result within" in found["controller"].detail
    assert "no result within" in found["broker"].detail


async def test_lost_telemetry_is_told(tmp_path: Path) -> None:
    Spool(tmp_path / "telemetry.db").close()
    with sqlite3.connect(tmp_path / "telemetry.db") as spool:
        spool.execute("update counters set value = 7 where name = 'lost'")
    spool.close()
    (found,) = await probing._spool(AgentSettings(data=tmp_path))
    assert found.verdict == "warning"
    assert "7 windows of telemetry lost" in found.detail
