"""What the controller needs of a database: units of work over a few small tables of values.

A unit of work is a plain function of a `Transaction`. `Store.write` runs it alone (one writer) and returns when it is
durable; works that wait at the same time share one commit, each in its own savepoint, so that one that raises is undone
alone and nobody else notices. `Store.read` runs it on a consistent snapshot, beside the writer. A work must be quick,
must not do other IO, and may run a second time after a crash, never twice otherwise.

Every adapter passes `tests/contract/test_store.py`. Lists are ordered by key and paged by the last key seen.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

from common.artifact.manifest import ArtifactRef, ReleaseManifest
from common.ids import DeviceId, Digest, ModelName, ReleaseRef
from common.monitoring.reference import Reference
from common.monitoring.sketch import Sketch
from common.wire import DeviceWindow, TelemetryWindow
from controller.devices import Device
from controller.rollouts.model import Execution, Rollout

T = TypeVar("T")

DEVICES_PER_CLASS_MAX = 32
"""Findings of a file that are kept for a class; a median needs no more."""
FINDINGS_PER_FILE_MAX = 1024
"""Findings of a file that are kept in all: devices name their classes themselves."""

Role = Literal["admin", "device", "join"]
"""`admin`: a person or a program that operates the fleet; `device`: one agent; `join`: may only enrol devices."""

PatchState = Literal["pending", "ready", "not_worth", "failed", "skipped"]

SkipCause = Literal["unheld", "cpu", "disk"]
"""Why a patch was skipped: no device holds its base, or a budget of the registry is used up."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The newest signed desired state of a device, exactly as it is sent; `etag` is the digest of the envelope."""

    device: DeviceId
    generation: int
    etag: Digest
    envelope: bytes
    created_at: float
    published: bool = False


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A published release; `envelope` names the signed manifest among the artifacts."""

    ref: ReleaseRef
    manifest: ReleaseManifest
    envelope: ArtifactRef
    published_at: float
    published_by: str


class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """A patch from one artifact to another, or the knowledge that there is none worth sending.

    `not_worth`: it would not save enough; `failed`: it could not be built; `skipped`: it was not built, or not kept,
    and may be one day (`skipped_for` says why not now). `reason` is a sentence. `cpu_s` is what all attempts to build
    it have cost, `needs_bytes` the size of one for which there was no room.
    """

    base: Digest
    target: Digest
    codec: str
    state: PatchState
    created_at: float
    patch: ArtifactRef | None = None
    reason: str = ""
    cpu_s: float = 0.0
    skipped_for: SkipCause | None = None
    needs_bytes: int = 0

    @property
    def may_be_asked_again(self) -> bool:
        """Whether to ask for it anew could change anything: whoever asks knows of a device that holds the base."""
        return self.skipped_for == "unheld"

    def to_be_built(self) -> "Patch":
        """The same, pending; what it has cost so far stays."""
        return msgspec.structs.replace(self, state="pending", reason="", skipped_for=None, needs_bytes=0)


class FileParts(msgspec.Struct, frozen=True, kw_only=True):
    """The list of the parts of a file (`common.artifact.parts`): an artifact, and its bytes, which decisions read."""

    file: Digest
    index: ArtifactRef
    data: bytes


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A bearer credential, known only by the SHA-256 of its text. `uses_left` None means any number."""

    id: str
    role: Role
    sha256: str
    subject: str
    created_at: float
    expires_at: float | None = None
    uses_left: int | None = None
    labels: dict[str, str] = {}
    """Labels that a device gets when it joins with this token."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, for watchers; `seq` is given by the store and grows."""

    kind: str
    subject: str
    at: float
    data: dict[str, object] = {}
    seq: int = 0


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Who did what to what, when, and why; append-only."""

    at: float
    actor: str
    action: str
    subject: str
    detail: dict[str, object] = {}
    seq: int = 0


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer that was given to a request with an Idempotency-Key; `request_sha256` tells a repeat from a misuse."""

    actor: str
    key: str
    request_sha256: str
    status: int
    body: bytes
    etag: str
    at: float


class FoundVariant(msgspec.Struct, frozen=True, kw_only=True):
    """What a device of `device_class` found of the ONNX file `artifact` when it took `release`: the median seconds of a
    run, None where it measured none, or that it could not take it.
    """

    artifact: Digest
    device_class: str
    device: DeviceId
    release: ReleaseRef
    at: float
    run_s: float | None = None
    failed: bool = False


class ReleaseTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Telemetry of one release summed over windows and devices; everything as in `TelemetryWindow`."""

    devices: int
    requests: int
    errors: int
    latency_counts: tuple[int, ...]
    latency_sum_s: float
    queue_counts: tuple[int, ...]
    queue_sum_s: float
    queue_max_s: float
    run_counts: tuple[int, ...]
    run_rows: int
    run_sum_s: float
    refused: int
    expired: int
    cancelled: int
    labelled: int
    correct: int


class DeviceTotals(msgspec.Struct, frozen=True, kw_only=True):
    """What agents used, summed over device windows in which a release was asked: `cpu_s` of `seconds` on each device.

    `windows_lost` is the newest count of each device; a process that serves several models cannot be divided.
    """

    devices: int
    seconds: float
    cpu_s: float
    rss_bytes_max: int
    pss_bytes_max: int
    windows_lost: int
    files_bad: int
    files_mended: int


class Devices(Protocol):
    """The fleet."""

    def get(self, device: DeviceId) -> Device | None: ...

    def put(self, device: Device) -> None:
        """Insert or replace."""

    def page(self, after: str, limit: int) -> list[Device]:
        """Up to `limit` devices with an id greater than `after`, in order."""
        ...

    def all(self) -> Iterator[Device]: ...

    def holders(self) -> Counter[Digest]:
        """How many devices say that they hold each file; one pass over the fleet that reads nothing else of it."""
        ...


class Orders(Protocol):
    """The newest order of each device."""

    def get(self, device: DeviceId) -> Order | None: ...

    def put(self, order: Order) -> None:
        """Insert or replace; `Conflict` if the generation is not newer than the one stored."""

    def unpublished(self, limit: int) -> list[Order]:
        """Orders that the broker has not acknowledged yet, oldest first."""
        ...

    def mark_published(self, device: DeviceId, generation: int) -> None:
        """Remember the acknowledgement, unless a newer order has come meanwhile."""


class Releases(Protocol):
    """Published releases. They are immutable."""

    def get(self, ref: ReleaseRef) -> Release | None: ...

    def add(self, release: Release) -> None:
        """Insert; `Conflict` if the release exists."""

    def page(self, after: tuple[str, str] | None, limit: int, model: ModelName | None = None) -> list[Release]:
        """Ordered by (model, version)."""
        ...

    def by_artifact(self, artifact: Digest) -> list[Release]:
        """Releases one of whose variants is this file."""
        ...


class Artifacts(Protocol):
    """Which blobs there are, and which are needed. The bytes are the registry's."""

    def get(self, digest: Digest) -> ArtifactRef | None: ...

    def put(self, artifact: ArtifactRef, at: float) -> None:
        """Insert, or renew the time of arrival of one that is there (an upload that will be referred to shortly)."""

    def unused(self, before: float) -> list[ArtifactRef]:
        """Artifacts that arrived before `before` and that no release, no ready patch and no list of parts refers to.

        A patch is needed while a release has its target as a file, and a list of parts while a release has the file
        that it is of. Orders and rollouts refer to releases, and
        releases are kept, so what they need is never listed.
        """
        ...

    def remove(self, digest: Digest) -> None: ...


class Patches(Protocol):
    """Patches by (base, target, codec)."""

    def get(self, base: Digest, target: Digest, codec: str) -> Patch | None: ...

    def put(self, patch: Patch) -> None:
        """Insert or replace."""

    def pending(self, limit: int) -> list[Patch]:
        """Oldest first."""
        ...

    def skipped(self, limit: int) -> list[Patch]:
        """Newest first: those that somebody may still want."""
        ...

    def ready(self) -> list[Patch]:
        """Those that can be offered, oldest first."""
        ...

    def ready_bytes(self) -> int:
        """How many bytes they take together."""
        ...

    def for_target(self, target: Digest) -> list[Patch]: ...


class PartsIndexes(Protocol):
    """The lists of parts, by the file that they are of."""

    def get(self, file: Digest) -> FileParts | None: ...

    def put(self, parts: FileParts) -> None:
        """Insert or replace."""


class Rollouts(Protocol):
    """Rollouts and their executions."""

    def get(self, rollout: str) -> Rollout | None: ...

    def put(self, rollout: Rollout) -> None:
        """Insert or replace."""

    def page(self, before: str, limit: int) -> list[Rollout]:
        """Newest first (ids sort by time): ids smaller than `before`, or from the newest if it is empty."""
        ...

    def active(self) -> list[Rollout]:
        """Those not in a terminal state."""
        ...

    def executions(self, rollout: str) -> list[Execution]: ...

    def put_executions(self, rollout: str, executions: Sequence[Execution]) -> None:
        """Insert or replace by (rollout, device)."""


class Tokens(Protocol):
    """Credentials by the SHA-256 of their text."""

    def find(self, sha256: str) -> Token | None: ...

    def get(self, token: str) -> Token | None: ...

    def put(self, token: Token) -> None:
        """Insert or replace."""

    def page(self, after: str, limit: int) -> list[Token]: ...

    def remove(self, token: str) -> None: ...


class Journal(Protocol):
    """Events for watchers (an outbox), the audit log, and answers to repeated requests."""

    def append_event(self, event: Event) -> int:
        """The sequence number it got."""
        ...

    def events_after(self, seq: int, limit: int) -> list[Event]: ...

    def append_audit(self, entry: AuditEntry) -> int: ...

    def audit_before(self, seq: int | None, limit: int) -> list[AuditEntry]:
        """Newest first."""
        ...

    def response(self, actor: str, key: str) -> StoredResponse | None: ...

    def put_response(self, response: StoredResponse) -> None: ...

    def forget(self, before: float) -> int:
        """Drop events and stored responses older than `before` (never audit entries); how many went."""
        ...


class TelemetryLog(Protocol):
    """What devices measured."""

    def add(
        self, device: DeviceId, windows: Sequence[TelemetryWindow], device_windows: Sequence[DeviceWindow] = ()
    ) -> None:
        """Insert; a window that is there already (device, model, version, started_at) is not counted twice.

        Sketches must fit the reference that they name.
        """

    def totals(self, release: ReleaseRef, since: float, devices: Sequence[DeviceId] | None = None) -> ReleaseTotals:
        """Sums over windows that ended at or after `since`, of all devices or of these."""
        ...

    def usage(self, release: ReleaseRef, since: float, devices: Sequence[DeviceId] | None = None) -> DeviceTotals:
        """What the agents used in those windows."""
        ...

    def sketches(
        self, release: ReleaseRef, since: float, devices: Sequence[DeviceId] | None = None
    ) -> Mapping[Digest, Sketch]:
        """The sum of the sketches of each reference. They are kept in spans, so some may be older than `since`."""
        ...

    def put_reference(self, digest: Digest, data: bytes) -> None:
        """Keep a reference for judging."""

    def reference(self, digest: Digest) -> Reference | None: ...

    def forget(self, before: float) -> int: ...


class VariantFindings(Protocol):
    """What devices found of variants (`controller.variants`), by the variant's ONNX file and the device's class."""

    def put(self, found: FoundVariant) -> None:
        """Insert or replace what the device found of the file; it is in one class with it, its newest. What says
        nothing (`run_s` None, not failed) replaces nothing.

        Of each file and class the newest `DEVICES_PER_CLASS_MAX` are kept, of each file the newest
        `FINDINGS_PER_FILE_MAX`.
        """

    def of(self, artifact: Digest) -> list[FoundVariant]:
        """All that is known of a file, by class and device."""
        ...


class Transaction(Protocol):
    """What a unit of work sees."""

    @property
    def devices(self) -> Devices: ...
    @property
    def orders(self) -> Orders: ...
    @property
    def releases(self) -> Releases: ...
    @property
    def artifacts(self) -> Artifacts: ...
    @property
    def patches(self) -> Patches: ...
    @property
    def parts(self) -> PartsIndexes: ...
    @property
    def rollouts(self) -> Rollouts: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def journal(self) -> Journal: ...
    @property
    def telemetry(self) -> TelemetryLog: ...
    @property
    def findings(self) -> VariantFindings: ...


class Store(Protocol):
    """A database."""

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` on a snapshot; it must not write."""
        ...

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` alone and return when its changes are durable; what it raises is raised here, changing nothing.

        Raises `Unavailable` when the queue of waiting works is full or the store is closing, `StorageFull` when the
        disk is full.
        """
        ...

    async def close(self) -> None:
        """Finish the works that wait, then close."""


__all__ = [
    "Artifacts",
    "AuditEntry",
    "Devices",
    "Event",
    "FileParts",
    "FoundVariant",
    "Journal",
    "Order",
    "Orders",
    "Patch",
    "PartsIndexes",
    "PatchState",
    "Patches",
    "Release",
    "ReleaseTotals",
    "Releases",
    "Role",
    "Rollouts",
    "SkipCause",
    "Store",
    "StoredResponse",
    "TelemetryLog",
    "Token",
    "Tokens",
    "Transaction",
    "VariantFindings",
]
