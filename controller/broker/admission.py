"""Who may speak on the broker: the port behind which an embedded or an external broker learns about devices.

The rules are the same everywhere. A device publishes on the kinds that devices send, below its own topic, and
subscribes below its own topic; the controller does the opposite for all devices. Nobody else gets in. A broker that
somebody else manages (`ManagedElsewhere`) is told nothing: its operator must keep the same rules, see
docs/how-to/external-broker.md.
"""

from typing import Protocol

from common.ids import DeviceId
from common.wire import TO_DEVICE, Kind

FROM_DEVICE = tuple(kind for kind in Kind if kind not in TO_DEVICE)
FOR_DEVICE = tuple(kind for kind in Kind if kind in TO_DEVICE)
"""The same kinds as `TO_DEVICE`, in a fixed order."""


class Admission(Protocol):
    """Lets devices in and keeps them out."""

    async def admit(self, device: DeviceId, password: str) -> None:
        """Let `device` connect with `password` from now on, instead of any earlier one; durable when this returns."""

    async def revoke(self, device: DeviceId) -> None:
        """Keep `device` out; a device that nobody admitted is no error."""


class ManagedElsewhere:
    """An external broker whose users are kept by its own operator; both calls do nothing."""

    async def admit(self, device: DeviceId, password: str) -> None:
        """Nothing: the broker's operator decides."""

    async def revoke(self, device: DeviceId) -> None:
        """Nothing: the broker's operator decides."""
