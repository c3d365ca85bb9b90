"""A device that was offline sends all its telemetry when it is back, in messages that keep within the limits."""

from pathlib import Path

import numpy as np

from common.ids import Digest, ModelName, Version
from common.monitoring.sketch import FeatureCounts, Sketch
from common.wire import DeviceWindow, Telemetry, TelemetryWindow, decode
from common.wire.codec import BYTES_MAX
from common.wire.topics import Kind, Topic
from controller.broker.embedded import EmbeddedBroker
from edge_agent.telemetry.spool import FILE_NAME, Spool
from tests.conftest import eventually
from tests.integration.mqtt_peer import Peer
from tests.integration.release_desk import DEVICE, ReleaseDesk
from tests.integration.small_agent import agent_at

WINDOWS = 40
FEATURES = 32
CELLS = 35


def large_window(number: int) -> TelemetryWindow:
    """A window of about 15 kB: few of them fit into one message."""
    chance = np.random.default_rng(number)
    features = tuple(
        FeatureCounts(tuple(map(int, chance.integers(10**11, 10**12, CELLS))), -0.5, 0.5) for _ in range(FEATURES)
    )
    return TelemetryWindow(
        model=ModelName("m"),
        version=Version("1"),
        started_at=float(number),
        ended_at=number + 1.0,
        requests=number,
        errors=0,
        latency_counts=(0,) * 17,
        latency_sum_s=0.0,
        sketch=Sketch(reference=Digest("sha256:" + "a" * 64), observations=9, features=features),
    )


async def test_large_windows_of_a_long_time_arrive_in_order_in_messages_that_are_small_enough(tmp_path: Path) -> None:
    desk, broker = ReleaseDesk(), EmbeddedBroker(tmp_path / "broker")
    await desk.start()
    await broker.start()
    await broker.admit(DEVICE, "p")
    (tmp_path / "agent").mkdir()
    spool = Spool(tmp_path / "agent" / FILE_NAME)
    for number in range(WINDOWS):
        device = DeviceWindow(started_at=float(number), ended_at=number + 1.0, cpu_s=0.5, rss_bytes=1)
        spool.add([large_window(number), device])
    spool.close()
    topic = str(Topic(DEVICE, Kind.TELEMETRY))
    async with Peer(broker.port, *broker.credentials) as controller:
        await controller.subscribe(topic)
        async with agent_at(tmp_path / "agent", desk, broker_port=broker.port):
            await eventually(lambda: len(windows(controller, topic)) == WINDOWS, "all windows have come")
    assert windows(controller, topic) == [large_window(number) for number in range(WINDOWS)]
    sizes = [len(payload) for payload in controller.payloads(topic)]
    assert max(sizes) <= BYTES_MAX[Telemetry]
    assert max(sizes) > BYTES_MAX[Telemetry] / 2, "messages are filled"
    old = [one for one in device_windows(controller, topic) if one.started_at < WINDOWS]
    assert [one.started_at for one in old] == [float(number) for number in range(WINDOWS)]
    await broker.stop()
    await desk.stop()


def windows(peer: Peer, topic: str) -> list[TelemetryWindow]:
    return [window for payload in peer.payloads(topic) for window in decode(payload, Telemetry).windows]


def device_windows(peer: Peer, topic: str) -> list[DeviceWindow]:
    return [window for payload in peer.payloads(topic) for window in decode(payload, Telemetry).device_windows or ()]
