"""The messages, one struct each. Times are seconds since the Unix epoch (UTC), sizes bytes, durations seconds.

`epoch` counts the MQTT connections of a device over its whole life (the agent persists it), `seq` the messages of one
kind within an epoch: `(device, epoch, seq)` names a message once and for all.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from common.artifact.manifest import FILE_NAME, FILES_PER_VARIANT_MAX, ArtifactRef
from common.ids import DeviceId, Digest, ModelName, Version
from common.monitoring.sketch import Sketch
from common.wire.traffic import Shadow, ShadowReport, Split, SplitReport

PROTOCOL_VERSION = 1

MODELS_PER_DEVICE_MAX = 32
PATCHES_PER_FILE_MAX = 16
PARTS_PER_FILE_MAX = 4
HELD_DIGESTS_MAX = 128
WINDOWS_PER_MESSAGE_MAX = 64
CHUNK_BYTES_MAX = 128 * 1024
TEXT_CHARS_MAX = 512

LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the latency histogram's buckets; one more bucket holds what is slower than the last."""

RUN_ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64)
"""Upper bounds of the buckets of rows in one run of the engine; one more bucket holds larger runs."""

COUNT_MAX = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly (RFC 8259, section 6), and that fits any database."""

Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
Seconds = Annotated[float, Meta(ge=0)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
LatencyCounts = Annotated[tuple[Count, ...], Meta(min_length=17, max_length=17)]
RunCounts = Annotated[tuple[Count, ...], Meta(min_length=8, max_length=8)]

Strategy = Literal["none", "delta", "incremental", "full"]
"""How the bytes came: they were here already, rebuilt from a patch, only the parts fetched that changed, or whole.

Of the files of one release the costliest says it, in this order.
"""

Transport = Literal["none", "mqtt", "http"]

UpdatePhase = Literal["idle", "fetching", "verifying", "warming", "shadowing", "replacing", "probation", "failed"]
"""Where a model stands on the device; `failed` lasts until a newer order."""

Outcome = Literal["succeeded", "failed", "rolled_back", "rejected"]
"""How an update ended for good.

`failed`: the device could not get or load the release; it never served. `rolled_back`: it served, was found unhealthy
and the previous release was put back. `rejected`: the order or the manifest did not pass the device's checks.
"""


NotRun = Literal["refused", "expired", "cancelled"]
"""Why a request was never run: no room for it, its deadline passed while it waited, its caller left."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What every message has."""

    v: Annotated[int, Meta(ge=1)] = PROTOCOL_VERSION
    device: DeviceId


class Sequenced(Message, frozen=True, kw_only=True):
    """A message from a device, with its place in that device's history."""

    epoch: Count
    seq: Count
    sent_at: float


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a device can do, and which variants it prefers, best first; `auto` leaves the choice to measurement."""

    agent_version: Text
    patch_codecs: tuple[Text, ...] = ()
    variants: tuple[Text, ...] = ("default",)
    cpu_count: Count = 0
    memory_bytes: Count = 0
    disk_bytes: Count = 0
    machine: Text = ""
    inference_url: Text = ""
    device_class: Text | UnsetType = UNSET
    """How it is built, as far as that decides how fast a model runs: devices that say the same measure for each other.
    """


class Presence(Sequenced, frozen=True, kw_only=True):
    """Birth (retained, on connect) and death (the MQTT will) on `state`.

    A death whose epoch is not the last birth's is of an older connection and must be ignored.
    """

    online: bool
    capabilities: Capabilities | None = None


class Heartbeat(Sequenced, frozen=True, kw_only=True):
    """I am alive, and this is how I feel. Percentages are 0 to 100 of the whole machine."""

    uptime_s: Seconds
    load_1m: Seconds
    cpu_percent: Seconds
    memory_bytes: Count
    memory_available_bytes: Count
    disk_bytes: Count
    disk_free_bytes: Count
    generation: Count
    running: dict[ModelName, Version]
    not_modified: Count = 0
    """How many polls for the desired state were answered 304 since the agent was installed."""


class TelemetryWindow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one release did on one device between two moments.

    `latency_counts` has one entry per bound of `LATENCY_BOUNDS_S` and one for what is slower; it counts inferences that
    were answered. `errors` are requests for which this release raised or gave non-finite numbers, whether or not the
    previous release could answer in its place. Requests that were never run are in none of these: they were `refused`
    (no room for them), `expired` (their deadline passed while they waited) or `cancelled` (the caller left first).
    """

    model: ModelName
    version: Version
    started_at: float
    ended_at: float
    requests: Count
    errors: Count
    latency_counts: LatencyCounts
    latency_sum_s: Seconds
    queue_counts: LatencyCounts | None = None
    """How long the requests that were run waited for a core, in the buckets of `latency_counts`; None: none was run."""
    queue_sum_s: Seconds = 0.0
    queue_max_s: Seconds = 0.0
    run_counts: RunCounts | None = None
    """Runs of the engine by the rows in each, in the buckets of `RUN_ROWS_BOUNDS`; None: there was none."""
    run_rows: Count = 0
    run_sum_s: Seconds = 0.0
    """Time inside the engine, over all cores."""
    refused: Count = 0
    expired: Count = 0
    cancelled: Count = 0
    labelled: Count = 0
    """Answers of this release whose true label came in this window, whenever they were given; `correct` were right."""
    correct: Count = 0
    sketch: Sketch | None = None
    """A sample of the inputs and the outputs, where the release carries a reference."""


class DeviceWindow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the agent's process used on one device between two moments, whatever models it ran.

    The process is the application where the agent is embedded in one. `pss_bytes` counts memory that several processes
    share in parts (proportional set size), None where the kernel does not tell; both sizes are as at the end.
    """

    started_at: float
    ended_at: float
    cpu_s: Seconds
    """CPU time of all threads, user and system."""
    rss_bytes: Count
    pss_bytes: Count | None = None
    windows_lost: Count = 0
    """Telemetry that was thrown away for want of room, since the agent's spool was made: it is not summed up."""
    files_bad: Count = 0
    """Installed files that were found not to be what they were."""
    files_mended: Count = 0


class Telemetry(Sequenced, frozen=True, kw_only=True):
    """Finished windows, oldest first; kept on the device's disk until the broker has acknowledged them."""

    windows: Annotated[tuple[TelemetryWindow, ...], Meta(max_length=WINDOWS_PER_MESSAGE_MAX)]
    device_windows: Annotated[tuple[DeviceWindow, ...], Meta(max_length=WINDOWS_PER_MESSAGE_MAX)] | UnsetType = UNSET
    """Left out when there are none."""


class PatchOffer(msgspec.Struct, frozen=True):
    """`patch` rebuilds `target` for a device that holds `base`; `codec` says what it takes to apply it.

    `target` is the wanted file or, in a chain, a file on the way to it, from which another patch of the list goes on.
    """

    base: Digest
    target: ArtifactRef
    patch: ArtifactRef
    codec: Text


class PartsOffer(msgspec.Struct, frozen=True):
    """What the wanted file shares with `base`, as the lists of their parts (`common.artifact.parts`).

    `index` lists the parts of the wanted file, `base_index` those of the held one. Parts that `base` has not are
    fetched as byte ranges of the wanted file; `bytes` is how much that is, the two lists not counted.
    """

    base: Digest
    base_index: ArtifactRef
    index: ArtifactRef
    bytes: Count


class DesiredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a release, and the ways to it that are shorter than all its bytes."""

    name: Annotated[str, Meta(pattern=FILE_NAME)]
    artifact: ArtifactRef
    patches: Annotated[tuple[PatchOffer, ...], Meta(max_length=PATCHES_PER_FILE_MAX)] = ()
    parts: Annotated[tuple[PartsOffer, ...], Meta(max_length=PARTS_PER_FILE_MAX)] = ()


OnExceed = Literal["defer", "fail"]
"""What a device does whose update would cost more than its byte budget: wait for a cheaper way, or give it up."""


class DesiredModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model a device should run.

    `manifest` is the signed release manifest (a DSSE envelope, an artifact like any other) and `files` those of the
    chosen `variant`, the ONNX file first. A device installs only what the signed order and the signed manifest agree
    on.
    """

    model: ModelName
    version: Version
    variant: Text
    manifest: ArtifactRef
    files: Annotated[tuple[DesiredFile, ...], Meta(min_length=1, max_length=FILES_PER_VARIANT_MAX)]
    order: Count
    """The generation in which this model's order last changed; only a newer one lifts a release out of quarantine."""
    probation_s: Seconds = 30.0
    """How long the device watches the new release beside the old one before it commits."""
    max_bytes: Count | None = None
    """The most bytes that this update may move over the network to the device, manifest and all; None: any number."""
    on_exceed: OnExceed = "defer"
    shadow: Shadow | UnsetType = UNSET
    """Try it on live requests before the switch; left out: not."""
    split: Split | UnsetType = UNSET
    """Who answers while it is in probation; left out: the new release everything."""
    measure: Literal[True] | UnsetType = UNSET
    """Measure how long a run of it takes, and report that with the variant; left out: not."""

    @property
    def artifact(self) -> ArtifactRef:
        """The ONNX file."""
        return self.files[0].artifact

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.artifact.size for file in self.files)


class DesiredState(Message, frozen=True, kw_only=True):
    """All that a device should run; the payload of the DSSE envelope on `desired` and of `GET .../desired`.

    The list is complete: a model that is not in it is taken out of service.
    """

    generation: Annotated[int, Meta(ge=1, le=COUNT_MAX)]
    issued_at: float
    models: Annotated[tuple[DesiredModel, ...], Meta(max_length=MODELS_PER_DEVICE_MAX)]
    traceparent: str | None = None
    """W3C Trace Context of the operation that caused this order."""


DESIRED_PAYLOAD_TYPE = "application/vnd.edgeferry.desired+json"


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """How the last finished update of a model ended, and what it cost.

    `reason` is a stable code (`error.code` of the failure, or `unhealthy`), `detail` a sentence. `bytes_transferred` is
    everything that crossed the network for it, manifest included; `full_bytes` is the size of the whole model.
    """

    generation: Count
    version: Version
    outcome: Outcome
    reason: Text = ""
    detail: Text = ""
    strategy: Strategy = "none"
    transport: Transport = "none"
    bytes_transferred: Count = 0
    full_bytes: Count = 0
    resumed_bytes: Count = 0
    """Bytes that an interrupted download had left on the disk and that were not fetched again."""
    started_at: float = 0.0
    activated_at: float | None = None
    finished_at: float = 0.0
    shadow: ShadowReport | UnsetType = UNSET
    split: SplitReport | UnsetType = UNSET
    variant: Text | UnsetType = UNSET
    """The variant that the order named, if it asked for a measurement."""
    run_s: Seconds | UnsetType = UNSET
    """Median seconds of a run on the device's own made-up input; left out where none was measured."""


class ReportedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the device says of one model: the release that answers requests now, and the update under way."""

    model: ModelName
    running: Version | None
    artifact: Digest | None
    phase: UpdatePhase
    target: Version | None = None
    generation: Count
    """The newest order for this model that the device has accepted."""
    activated_at: float | None = None
    detail: Text = ""
    """What the update under way is waiting for (a full disk, a broken network, a way that fits the byte budget), as a
    sentence; empty while it moves.
    """
    last_update: UpdateReport | None = None
    shadow: ShadowReport | UnsetType = UNSET
    """What the update under way found in its shadow time."""


class ReportedState(Sequenced, frozen=True, kw_only=True):
    """The device's side of the twin, retained on `reported`: sent on connect and on every change."""

    generation: Count
    models: Annotated[tuple[ReportedModel, ...], Meta(max_length=MODELS_PER_DEVICE_MAX)] = ()
    held: Annotated[tuple[Digest, ...], Meta(max_length=HELD_DIGESTS_MAX)] = ()
    """Artifacts on the device from which a patch could start."""
    refused: Text = ""
    """Why the newest order was not accepted at all (bad signature, older generation); empty when it was."""
    traceparent: str | None = None


class ChunkRequest(Message, frozen=True, kw_only=True):
    """Please send `length` bytes of an artifact from `offset`. The device asks for each chunk, so it sets the pace."""

    digest: Annotated[Digest, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
    offset: Count
    length: Annotated[int, Meta(ge=1, le=CHUNK_BYTES_MAX)]


class Chunk(Message, frozen=True, kw_only=True):
    """The answer to a `ChunkRequest`: the bytes, or why not (`error` is a code such as `not_found`)."""

    digest: Digest
    offset: Count
    total: Count
    data: Annotated[bytes, Meta(max_length=CHUNK_BYTES_MAX)] = b""
    error: Text = ""
