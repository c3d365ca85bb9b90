"""What the device remembers of one model, exactly as the journal keeps it.

Up to three releases are named: `installed` answers requests and is proven; `candidate` is complete and verified in the
other slot, and is being tried; `previous` is what that other slot held before, kept as a base for patches and as a way
back. Two slots exist, so `previous` and `candidate` are never there together. A release is named here only after its
slot is complete, verified and on the disk.
"""

from enum import StrEnum
from typing import Literal

import msgspec

from common.artifact import ArtifactRef, TensorSpec
from common.ids import Digest, ModelName, Version
from common.wire import DesiredModel, Strategy, Transport, UpdateReport

Slot = Literal["a", "b"]

QUARANTINE_MAX = 16
"""Failed releases remembered per model; the oldest is forgotten first."""


class Stage(StrEnum):
    """Where an update stands. What a restart does in each is in `machine.resume` and docs/explanation."""

    IDLE = "idle"
    """The order is carried out, or there was none yet."""
    FETCHING = "fetching"
    """Manifest and bytes are on their way."""
    VERIFYING = "verifying"
    """The artifact is being rebuilt in the idle slot and its digest checked."""
    WARMING = "warming"
    """The candidate is being loaded and tried with made-up inputs; the installed release serves."""
    SWITCHING = "switching"
    """The candidate is about to answer requests, or just began to."""
    PROBATION = "probation"
    """The candidate answers, the installed release stands behind it."""
    FAILED = "failed"
    """The order could not be carried out; nothing is tried until a newer one comes."""
    RETIRED = "retired"
    """The model left the order and is out of service."""


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A complete, verified release in a slot."""

    slot: Slot
    version: Version
    variant: str
    artifact: ArtifactRef
    manifest: ArtifactRef
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    activated_at: float | None = None


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What an update has cost so far, in bytes that crossed the network."""

    strategy: Strategy = "none"
    transport: Transport = "none"
    bytes_transferred: int = 0
    resumed_bytes: int = 0

    def plus(self, spent: "Tally") -> "Tally":
        """This and `spent`, which came later: its way of getting the bytes is the one that counts."""
        return Tally(
            strategy=spent.strategy if spent.strategy != "none" else self.strategy,
            transport=spent.transport if spent.transport != "none" else self.transport,
            bytes_transferred=self.bytes_transferred + spent.bytes_transferred,
            resumed_bytes=self.resumed_bytes + spent.resumed_bytes,
        )


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that failed here under `order`; only an order with a higher number may try them again."""

    artifact: Digest
    version: Version
    order: int
    reason: str


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one model. `order` is the newest order for it that was taken up."""

    model: ModelName
    stage: Stage = Stage.IDLE
    order: int = 0
    target: DesiredModel | None = None
    traceparent: str | None = None
    installed: Installed | None = None
    candidate: Installed | None = None
    previous: Installed | None = None
    tally: Tally = Tally()
    attempt: int = 0
    """Transient failures since the last progress: the exponent of the backoff."""
    redownloads: int = 0
    """Times the bytes came whole and wrong."""
    strikes: int = 0
    """Times the program died while the candidate was loaded or served."""
    patch_refused: str = ""
    """Why patches are not used for this update any more; empty while they may be."""
    trouble: str = ""
    """What the update is waiting for, as a sentence; empty while it moves."""
    started_at: float = 0.0
    quarantine: tuple[Quarantined, ...] = ()
    last_update: UpdateReport | None = None


def idle_slot(state: ModelState) -> Slot:
    """The slot that may be written: not the installed release's."""
    return "b" if state.installed is not None and state.installed.slot == "a" else "a"


def is_release(installed: Installed | None, target: DesiredModel) -> bool:
    """Whether `installed` is exactly what `target` asks for, manifest included."""
    return installed is not None and (
        (installed.version, installed.variant, installed.artifact, installed.manifest)
        == (target.version, target.variant, target.artifact, target.manifest)
    )


def same_release(one: DesiredModel | None, other: DesiredModel) -> bool:
    """Whether two orders ask for the same release, whatever patches they offer."""
    return one is not None and (
        (one.version, one.variant, one.artifact, one.manifest)
        == (other.version, other.variant, other.artifact, other.manifest)
    )


def is_quarantined(state: ModelState, target: DesiredModel) -> bool:
    """Whether these bytes failed here under this order or a newer one."""
    return any(entry.artifact == target.artifact.digest and entry.order >= target.order for entry in state.quarantine)
