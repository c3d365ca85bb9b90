"""The topic grammar, both ways: `fc/v1/d/{device}/{kind}`.

| kind | direction | QoS | retained | payload |
| --- | --- | --- | --- | --- |
| `state` | from the device | 1 | yes | `Presence`: birth, and death as the will |
| `hb` | from the device | 0 | no | `Heartbeat` |
| `tel` | from the device | 1 | no | `Telemetry` |
| `reported` | from the device | 1 | yes | `ReportedState` |
| `rq` | from the device | 0 | no | `ChunkRequest` |
| `desired` | to the device | 1 | yes | DSSE envelope of `DesiredState` |
| `dl` | to the device | 0 | no | `Chunk` |

What is sent again anyway when it is lost (the next heartbeat, the same chunk asked for once more) has QoS 0: the
broker would otherwise write it to its disk first.

A device may publish and subscribe below its own `fc/v1/d/{device}` only, and the broker enforces that. The device in
the topic is the one that counts: a message that names another device is refused by the codec's caller.
"""

from enum import StrEnum

import msgspec

from common.errors import InvalidInput
from common.ids import DeviceId, parse_device_id

PREFIX = "fc/v1"


class Kind(StrEnum):
    """The last level of a topic."""

    STATE = "state"
    HEARTBEAT = "hb"
    TELEMETRY = "tel"
    REPORTED = "reported"
    CHUNK_REQUEST = "rq"
    DESIRED = "desired"
    CHUNK = "dl"


KINDS = frozenset(kind.value for kind in Kind)
TO_DEVICE = frozenset({Kind.DESIRED, Kind.CHUNK})
RETAINED = frozenset({Kind.STATE, Kind.REPORTED, Kind.DESIRED})
AT_MOST_ONCE = frozenset({Kind.HEARTBEAT, Kind.CHUNK_REQUEST, Kind.CHUNK})


class Topic(msgspec.Struct, frozen=True):
    """One device's topic of one kind."""

    device: DeviceId
    kind: Kind

    def __str__(self) -> str:
        return f"{PREFIX}/d/{self.device}/{self.kind.value}"

    @property
    def retained(self) -> bool:
        """Whether the broker keeps the last message for whoever subscribes later."""
        return self.kind in RETAINED

    @property
    def qos(self) -> int:
        """The MQTT quality of service to publish with: 0 (at most once) or 1 (at least once)."""
        return 0 if self.kind in AT_MOST_ONCE else 1

    @classmethod
    def parse(cls, text: str) -> "Topic":
        """The topic that `text` spells, or `InvalidInput`."""
        head, _, rest = text.partition("/d/")
        device, slash, kind = rest.partition("/")
        if head != PREFIX or not slash or kind not in KINDS:
            raise InvalidInput(f"{text[:120]!r} is no topic of ours", field="topic")
        return cls(parse_device_id(device, "topic"), Kind(kind))


def filters_for_controller() -> tuple[str, ...]:
    """What the controller subscribes to: every kind that devices send."""
    return tuple(f"{PREFIX}/d/+/{kind.value}" for kind in Kind if kind not in TO_DEVICE)


def filters_for_device(device: DeviceId) -> tuple[str, ...]:
    """What a device subscribes to: its own orders and chunks."""
    return tuple(str(Topic(device, kind)) for kind in Kind if kind in TO_DEVICE)
