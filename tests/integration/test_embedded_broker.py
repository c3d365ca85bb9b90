"""The embedded broker, with the real server and a plain MQTT client: who may do what, and what survives what."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from common.errors import Conflict, InvalidInput
from common.ids import DeviceId
from controller.broker.embedded import EmbeddedBroker
from tests.conftest import eventually
from tests.integration.mqtt_peer import Peer

D1, D2 = DeviceId("d1"), DeviceId("d2")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(tmp_path / "broker")
    await broker.start()
    await broker.admit(D1, "one")
    await broker.admit(D2, "two")
    yield broker
    await broker.stop()


def pid_of(folder: Path) -> int:
    return int((folder / "broker/nats.pid").read_text())


def server_of(folder: Path) -> psutil.Process:
    return psutil.Process(pid_of(folder))


def controller(broker: EmbeddedBroker, client_id: str = "") -> Peer:
    return Peer(broker.port, *broker.credentials, client_id)


async def test_a_device_and_the_controller_reach_each_other(broker: EmbeddedBroker) -> None:
    async with controller(broker) as center, Peer(broker.port, "d1", "one") as device:
        assert await center.subscribe("fc/v1/d/+/reported")
        assert await device.subscribe("fc/v1/d/d1/desired")
        await device.publish("fc/v1/d/d1/reported", b"here")
        await center.publish("fc/v1/d/d1/desired", b"order")
        await eventually(lambda: center.got and device.got, "both messages")
        assert center.payloads("fc/v1/d/d1/reported") == [b"here"]
        assert device.payloads("fc/v1/d/d1/desired") == [b"order"]


@pytest.mark.parametrize("topic", ["fc/v1/d/d2/desired", "fc/v1/d/+/desired", "fc/v1/#", "#", "$MQTT/#", "$MQTT/sub/#"])
async def test_a_device_gets_nothing_through_a_foreign_subscription(broker: EmbeddedBroker, topic: str) -> None:
    async with controller(broker) as center, Peer(broker.port, "d1", "one") as device:
        await device.subscribe(topic)
        await device.subscribe("fc/v1/d/d1/desired")
        await center.publish("fc/v1/d/d2/desired", b"secret", retain=True)
        await center.publish("fc/v1/d/d1/desired", b"mine")
        await eventually(lambda: device.got, "the device's own message")
        assert [got.payload for got in device.got] == [b"mine"]


@pytest.mark.parametrize("topic", ["fc/v1/d/d2/reported", "fc/v1/d/d2/desired", "fc/v1/d/d1/desired", "$MQTT/sub/x"])
async def test_what_a_device_may_not_publish_reaches_nobody(broker: EmbeddedBroker, topic: str) -> None:
    async with (
        controller(broker) as center,
        Peer(broker.port, "d1", "one") as device,
        Peer(broker.port, "d2", "two") as other,
    ):
        await center.subscribe("fc/v1/d/+/reported")
        await other.subscribe("fc/v1/d/d2/#")
        await device.subscribe("fc/v1/d/d1/#")
        await device.publish(topic, b"forged", retain=True)
        await device.publish("fc/v1/d/d1/reported", b"true")
        await center.publish("fc/v1/d/d2/desired", b"order")
        await eventually(lambda: center.got and other.got and device.got, "what is allowed")
        assert b"forged" not in [got.payload for peer in (center, other, device) for got in peer.got]


@pytest.mark.parametrize(("username", "password"), [("d1", "two"), ("d3", "one"), ("", ""), ("_controller", "one")])
async def test_nobody_gets_in_with_a_wrong_name_or_password(
    broker: EmbeddedBroker, username: str, password: str
) -> None:
    async with Peer(broker.port, username, password) as stranger:
        assert stranger.refusal
        assert not stranger.client.is_connected()


async def test_the_server_s_own_protocol_is_closed_to_devices(broker: EmbeddedBroker, tmp_path: Path) -> None:
    """Over it, a device could subscribe to the queues in which other devices' messages wait."""
    listening = [c.laddr.port for c in server_of(tmp_path).net_connections() if c.status == psutil.CONN_LISTEN]
    (own_port,) = set(listening) - {broker.port}
    reader, writer = await asyncio.open_connection("127.0.0.1", own_port)
    await reader.readline()
    writer.write(b'CONNECT {"user":"d1","pass":"one","verbose":true}\r\nPING\r\n')
    assert b"Authorization Violation" in await reader.readline()
    writer.close()


async def test_birth_and_will_are_kept_for_who_comes_later(broker: EmbeddedBroker) -> None:
    async with Peer(broker.port, "d1", "one", will=("fc/v1/d/d1/state", b"dead")) as device:
        await device.publish("fc/v1/d/d1/state", b"alive", retain=True)
        async with controller(broker) as center:
            await center.subscribe("fc/v1/d/+/state")
            await eventually(lambda: center.got, "the birth")
            assert center.got == [("fc/v1/d/d1/state", b"alive", True)]
        await device.vanish()
    async with controller(broker) as center:
        await center.subscribe("fc/v1/d/+/state")
        await eventually(lambda: b"dead" in center.payloads("fc/v1/d/d1/state"), "the will")


async def test_admitting_a_device_disturbs_nobody(broker: EmbeddedBroker) -> None:
    async with Peer(broker.port, "d1", "one") as device, controller(broker) as center:
        await broker.admit(DeviceId("d3"), "three")
        async with Peer(broker.port, "d3", "three") as newcomer:
            assert not newcomer.refusal
        await center.subscribe("fc/v1/d/+/reported")
        await device.publish("fc/v1/d/d1/reported", b"still here")
        assert (device.disconnects, center.disconnects) == (0, 0)


async def test_many_admissions_at_once_all_work(broker: EmbeddedBroker) -> None:
    await asyncio.gather(*(broker.admit(DeviceId(f"n{number}"), f"p{number}") for number in range(40)))
    for number in (0, 17, 39):
        async with Peer(broker.port, f"n{number}", f"p{number}") as device:
            assert not device.refusal


async def test_a_revoked_device_is_cut_off_and_stays_out(broker: EmbeddedBroker) -> None:
    async with Peer(broker.port, "d1", "one") as device:
        await broker.revoke(D1)
        await eventually(lambda: device.disconnects, "the cut")
    async with Peer(broker.port, "d1", "one") as device:
        assert device.refusal
    await broker.revoke(DeviceId("never-admitted"))


async def test_users_and_messages_outlive_a_restart(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async with Peer(broker.port, "d1", "one", client_id="d1-session") as device:
        await device.subscribe("fc/v1/d/d1/desired")
    async with controller(broker) as center:
        await center.publish("fc/v1/d/d1/desired", b"while you were away", retain=True)
    port = broker.port
    await broker.stop()
    again = EmbeddedBroker(tmp_path / "broker")
    await again.start()
    try:
        assert again.port == port
        assert (again.credentials, again.client_id) == (broker.credentials, broker.client_id)
        async with Peer(again.port, "d1", "one", client_id="d1-session") as device:
            await eventually(lambda: device.got, "the message that waited")
            assert device.payloads("fc/v1/d/d1/desired")[0] == b"while you were away"
    finally:
        await again.stop()


async def test_a_server_that_dies_is_started_again(broker: EmbeddedBroker, tmp_path: Path) -> None:
    async with controller(broker) as center:
        await center.publish("fc/v1/d/d1/desired", b"kept", retain=True)
    first = server_of(tmp_path)
    first.kill()
    await eventually(lambda: pid_of(tmp_path) != first.pid, "a new server")
    await broker.admit(DeviceId("d3"), "three")  # waits for the server
    async with Peer(broker.port, "d1", "one") as device:
        assert await device.receive_retained("fc/v1/d/d1/desired") == b"kept"
    async with Peer(broker.port, "d3", "three") as newcomer:
        assert not newcomer.refusal


async def test_stopping_leaves_no_process(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path / "broker")
    await broker.start()
    server = server_of(tmp_path)
    await broker.stop()
    assert not server.is_running()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", broker.port)


async def test_a_taken_port_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"127.0.0.1:{port}.*--broker-listen") as raised:
            await EmbeddedBroker(tmp_path / "broker", port=port).start()
    assert raised.value.field == "broker_listen"
    assert not psutil.Process().children()


async def test_an_address_of_another_machine_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"broker_listen.*192\.0\.2\.1"):
        await EmbeddedBroker(tmp_path / "broker", host="192.0.2.1").start()


async def test_a_damaged_list_of_users_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    folder.mkdir()
    (folder / "users.json").write_text('{"d1": ')
    with pytest.raises(InvalidInput, match=r"users\.json.*backup"):
        await EmbeddedBroker(folder).start()


async def test_secrets_are_readable_by_their_owner_only(broker: EmbeddedBroker, tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    assert folder.stat().st_mode & 0o077 == 0
    for name in ("secret", "users.json", "nats.json"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    assert "one" not in (folder / "users.json").read_text()
    assert broker.credentials[1] not in (folder / "nats.json").read_text()


KILLED = """
import asyncio, pathlib, sys
from controller.broker.embedded import EmbeddedBroker
async def main():
    broker = EmbeddedBroker(pathlib.Path(sys.argv[1]))
    await broker.start()
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_the_server_dies_with_a_killed_controller(tmp_path: Path) -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(tmp_path / "broker"), stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    assert await program.stdout.readline() == b"up\n"
    server = server_of(tmp_path)
    program.kill()
    await program.wait()
    await eventually(lambda: not _alive(server), "the end of the server")


async def test_a_server_left_behind_is_ended_before_a_new_one_starts(tmp_path: Path) -> None:
    first = EmbeddedBroker(tmp_path / "broker")
    await first.start()
    left_behind = server_of(tmp_path)
    assert first._supervisor is not None
    first._supervisor.cancel()  # as if nobody had been there to end it
    second = EmbeddedBroker(tmp_path / "broker")
    await second.start()
    try:
        assert not _alive(left_behind)
        assert second.port == first.port
    finally:
        await second.stop()
        await first.stop()


async def test_a_pid_that_now_belongs_to_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    folder.mkdir()
    bystander = await asyncio.create_subprocess_exec("sleep", "600")
    (folder / "nats.pid").write_text(str(bystander.pid))
    broker = EmbeddedBroker(folder)
    await broker.start()
    await broker.stop()
    assert bystander.returncode is None
    os.kill(bystander.pid, signal.SIGKILL)
    await bystander.wait()


def _alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
