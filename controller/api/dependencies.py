"""What the API is built from. The composition root fills it in; nothing below `api` knows of it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from common.clock import Clock
from common.ids import DeviceId
from common.trust import Signer
from controller.registry.blobs import LocalBlobs
from controller.registry.releases import Releases
from controller.store.port import Store

JSON_BYTES_MAX = 256 * 1024
"""The largest JSON body."""


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What operators can set. URLs are the ones that devices use to reach us."""

    public_url: str
    broker_url: str
    heartbeat_s: float = 15.0
    poll_s: float = 60.0
    blob_bytes_max: int = 4 * 2**30
    sse_keepalive_s: float = 15.0
    event_poll_s: float = 0.25
    """How often the store is asked for new events while somebody watches."""


class Nudgeable(Protocol):
    """A loop that can be told that there is something to do."""

    def nudge(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """The parts of the controller that the API speaks to.

    `admit(device, password)` lets a device into the broker and may be repeated; `health` names the parts and how they
    are ("ok" or a sentence); `metrics` is the Prometheus text and its content type.
    """

    store: Store
    blobs: LocalBlobs
    releases: Releases
    patches: Nudgeable
    reconciler: Nudgeable
    admit: Callable[[DeviceId, str], Awaitable[None]]
    signer: Signer
    clock: Clock
    settings: ApiSettings
    health: Callable[[], Mapping[str, str]] = dict
    metrics: Callable[[], tuple[bytes, str]] = lambda: (b"", "text/plain; version=0.0.4")
