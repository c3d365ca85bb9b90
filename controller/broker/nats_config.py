"""What the embedded NATS server is told: its configuration file, as a function of users and limits. Pure.

NATS maps an MQTT topic to a subject by turning `/` into `.`, and permissions are written in subjects. Its configuration
language takes JSON, so the file is JSON. The rules:

- Every user may connect over MQTT only. The server cannot run without a port for its own protocol; it is on loopback,
  at a random port, and no user is allowed in there: over that protocol a device could read other devices' queues.
- A device may publish each kind that devices send, and subscribe below its own topic: `fc.v1.d.ID` as well, because
  a subscription to `fc/v1/d/ID/#` covers that topic too.
- Nobody may use `#` or `$`-topics.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from common.ids import DeviceId
from common.wire import Topic
from common.wire.topics import PREFIX
from controller.broker.admission import FOR_DEVICE, FROM_DEVICE

CONTROLLER_USER = "_controller"
"""Devices log in under their own id, and no device id has an underscore."""
MESSAGE_BYTES_MAX = 1024 * 1024
"""The largest MQTT packet the server takes; the largest message of ours is far below."""
STORE_BYTES_MAX = 4 * 1024**3
"""Disk for retained messages and for what waits for absent clients."""
MEMORY_STORE_BYTES_MAX = 32 * 1024**2
UNACKNOWLEDGED_MAX = 1024
"""QoS 1 messages on their way to one subscriber."""


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What may differ between a production server and one in a test."""

    ack_wait_s: float = 30.0
    """An unacknowledged message is sent again after this long."""
    connections_max: int = 16_384


def server_config(
    *, folder: Path, host: str, port: int, controller_hash: str, devices: Mapping[DeviceId, str], limits: ServerLimits
) -> bytes:
    """The configuration file of a server whose MQTT side listens on `host:port`.

    `folder` is where it keeps its data; `controller_hash` and the values of `devices` (by device id) are bcrypt hashes.
    """
    users = [_user(CONTROLLER_USER, controller_hash, *_controller_subjects())]
    users += [_user(device, hashed, *_device_subjects(device)) for device, hashed in devices.items()]
    config = {
        "server_name": "edgeferry",
        "host": "127.0.0.1",
        "port": -1,
        "max_connections": limits.connections_max,
        "max_payload": MESSAGE_BYTES_MAX,
        "jetstream": {
            "store_dir": str(folder / "jetstream"),
            "max_file_store": STORE_BYTES_MAX,
            "max_memory_store": MEMORY_STORE_BYTES_MAX,
            "sync_interval": "1s",
        },
        "mqtt": {
            "host": host,
            "port": port,
            "ack_wait": f"{limits.ack_wait_s}s",
            "max_ack_pending": UNACKNOWLEDGED_MAX,
        },
        "authorization": {"users": users},
    }
    return msgspec.json.format(msgspec.json.encode(config), indent=1)


def _user(name: str, password_hash: str, publish: list[str], subscribe: list[str]) -> dict[str, object]:
    return {
        "user": name,
        "password": password_hash,
        "allowed_connection_types": ["MQTT"],
        "permissions": {"publish": publish, "subscribe": subscribe},
    }


def _device_subjects(device: DeviceId) -> tuple[list[str], list[str]]:
    own = _subject(f"{PREFIX}/d/{device}")
    return [_subject(str(Topic(device, kind))) for kind in FROM_DEVICE], [own, f"{own}.>"]


def _controller_subjects() -> tuple[list[str], list[str]]:
    every = _subject(f"{PREFIX}/d")
    return [f"{every}.*.{kind.value}" for kind in FOR_DEVICE], [f"{every}.*.{kind.value}" for kind in FROM_DEVICE]


def _subject(topic: str) -> str:
    return topic.replace("/", ".")
