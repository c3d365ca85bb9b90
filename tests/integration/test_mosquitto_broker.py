"""The files that the controller writes for mosquitto, read by a real mosquitto where there is one."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.errors import Unavailable
from common.ids import DeviceId
from common.wire import Kind, Topic
from controller.broker.link import BrokerLink
from controller.broker.mosquitto import MosquittoFiles
from controller.broker.ports import free_port
from tests.conftest import eventually
from tests.integration.mqtt_peer import Peer

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
D1, D2 = DeviceId("d1"), DeviceId("d2")

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed on this machine")


class Mosquitto:
    """A running mosquitto on the files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port("127.0.0.1", "port")
        (folder / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous false\nuser root\n"
            f"password_file {folder}/passwords\nacl_file {folder}/acl\n"
        )
        self.process = subprocess.Popen([str(MOSQUITTO), "-c", str(folder / "mosquitto.conf")])

    @property
    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
async def files(tmp_path: Path) -> MosquittoFiles:
    files = MosquittoFiles(tmp_path, "_controller", "secret")
    await files.start()
    await files.admit(D1, "one")
    await files.admit(D2, "two")
    return files


@pytest.fixture
async def mosquitto(files: MosquittoFiles, tmp_path: Path) -> AsyncIterator[Mosquitto]:
    mosquitto = Mosquitto(tmp_path)
    await eventually(lambda: mosquitto.listens, "mosquitto listens")
    yield mosquitto
    mosquitto.stop()


async def test_devices_reach_the_controller_and_not_each_other(mosquitto: Mosquitto) -> None:
    got: list[bytes] = []

    async def take(_topic: Topic, payload: bytes) -> None:
        got.append(payload)

    link = BrokerLink(f"mqtt://127.0.0.1:{mosquitto.port}", "_controller", "secret", "c", take, uniform=lambda: 0.1)
    await link.start()
    await link.wait_connected()
    async with Peer(mosquitto.port, "d1", "one") as d1, Peer(mosquitto.port, "d2", "two") as d2:
        for peer in (d1, d2):
            await peer.subscribe("fc/v1/d/d1/desired")
        await d2.publish("fc/v1/d/d1/reported", b"forged")
        await d1.publish("fc/v1/d/d1/reported", b"true")
        await link.publish(Topic(D1, Kind.DESIRED), b"order")
        await eventually(lambda: got and d1.got, "what is allowed")
        assert (got, [message.payload for message in d1.got], d2.got) == ([b"true"], [b"order"], [])
    await link.stop()
    with pytest.raises(Unavailable):
        await link.publish(Topic(D1, Kind.DESIRED), b"order")


async def test_a_device_is_known_after_a_reload(mosquitto: Mosquitto, files: MosquittoFiles) -> None:
    await files.revoke(D2)
    await files.admit(DeviceId("d3"), "three")
    mosquitto.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while not await let_in(mosquitto, "d3", "three"):
        assert time.monotonic() < deadline, "the newcomer is never let in"
    assert await let_in(mosquitto, "d1", "one")
    assert not await let_in(mosquitto, "d2", "two")


async def let_in(mosquitto: Mosquitto, username: str, password: str) -> bool:
    async with Peer(mosquitto.port, username, password) as peer:
        return not peer.refusal
