"""What every way of fetching has in common: its result, its limits, and the shape of the call."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from common.artifact import ArtifactRef
from common.artifact.protobuf import Span
from common.wire.messages import CHUNK_BYTES_MAX, Transport

OnProgress = Callable[[int, int], object]
"""Called as bytes arrive, with how many this fetch has moved over the network so far, and how many it needs in all."""

MIB = 1024 * 1024


class Ranges(NamedTuple):
    """Byte ranges of an artifact, in order, that are fetched into one file; `holds` tells whether a file is that."""

    spans: tuple[Span, ...]
    holds: Callable[[Path], bool]


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished fetch cost: bytes that crossed the network, and bytes that were on the disk already."""

    bytes: int
    resumed_bytes: int
    transport: Transport


class FetchLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long, how fast and how much at once."""

    idle_s: float = 30.0
    """Give an attempt up after this long without a byte."""
    total_s: float = 3600.0
    """Give an attempt up after this long in all; the next one resumes."""
    rate_bytes_per_s: int = 0
    """Download no faster than this, for metered links; 0 means as fast as it goes."""
    mqtt_bytes_max: int = MIB
    """Fetch artifacts up to this size over MQTT; 0 means always over HTTP."""
    chunk_bytes: int = CHUNK_BYTES_MAX
    """How much one MQTT request asks for."""
    chunk_timeout_s: float = 5.0
    """Ask again for a chunk that has not come after this long."""
    chunk_attempts_max: int = 4
    """Give up after asking this often for one chunk."""


class Fetching(Protocol):
    """One way to get an artifact."""

    async def fetch(
        self,
        ref: ArtifactRef,
        destination: Path,
        on_progress: OnProgress | None = None,
        ranges: Ranges | None = None,
        moved_max: int | None = None,
    ) -> Transfer:
        """Put the artifact at `destination`, complete and verified, resuming what an earlier try left beside it.

        With `ranges` only those of its bytes are fetched, and put there one after another. Gives up with `Unavailable`
        rather than move more than `moved_max` bytes over the network.

        Raises `IntegrityFailure` when the bytes are wrong even from the start, `StorageFull` (what came is kept),
        `NotFound`, and `Unavailable` when trying again later may help.
        """
        ...
