"""The resources of the HTTP API: what goes in and what comes out, one struct each.

The server encodes them, the client decodes them, the OpenAPI document describes them; nobody describes them twice.
Requests refuse unknown fields, so that a misspelt option is an error and not a default; answers may grow fields, and
old clients ignore those. What the controller's own values already say well (a rollout's spec, an execution, an event,
an audit entry) is shown as it is. No secret is ever part of a view: tokens appear once, in the answer that makes them.

Times are seconds since the Unix epoch, sizes bytes, durations seconds, names as in `common.ids`.
"""

import re
from typing import Annotated, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from common import ids
from common.artifact import TensorSpec
from common.artifact.manifest import FILES_PER_VARIANT_MAX, VARIANTS_MAX, ArtifactRef, ReleaseManifest
from common.artifact.pipeline import Steps
from common.artifact.selftest import LATENCY_S_MAX, RULES_MAX, Rule
from common.artifact.serving import GivenServing
from common.ids import DeviceId, Digest, ModelName, Version
from common.monitoring.accuracy import Accuracy
from common.monitoring.drift import Drift, Verdict
from common.trust import PublicKey
from common.wire import Capabilities, Heartbeat, ReportedState
from controller.devices import Presence
from controller.rollouts.model import (
    ExecutionState,
    OnFailure,
    PhaseSpec,
    PhaseState,
    RolloutSpec,
    RolloutState,
)
from controller.store.port import PatchState
from controller.variants import Chosen

T = TypeVar("T")

PAGE_LIMIT = 100
PAGE_LIMIT_MAX = 1000
JOIN_USES_MAX = 100_000
JOIN_TTL_S = 24 * 3600
JOIN_TTL_S_MAX = 365 * 24 * 3600
GARBAGE_AGE_S = 3600.0
TELEMETRY_S = 3600.0
TELEMETRY_S_MAX = 366 * 24 * 3600
TEXT_CHARS_MAX = 512


def _described(grammar: re.Pattern[str]) -> Meta:
    """The grammar for the OpenAPI document only: our own parsers check it, with an error that people understand."""
    return Meta(extra_json_schema={"pattern": f"^{grammar.pattern}$"})


GivenModel = Annotated[ModelName, _described(ids.MODEL_NAME)]
GivenVersion = Annotated[Version, _described(ids.VERSION)]
GivenDigest = Annotated[Digest, _described(ids.DIGEST)]
LabelKey = Annotated[str, _described(ids.LABEL_KEY)]
LabelValue = Annotated[str, Meta(extra_json_schema={"maxLength": ids.LABEL_VALUE_CHARS_MAX})]
GivenFiles = Annotated[
    dict[str, GivenDigest], Meta(extra_json_schema={"minProperties": 1, "maxProperties": FILES_PER_VARIANT_MAX})
]
Labels = Annotated[dict[LabelKey, LabelValue], Meta(extra_json_schema={"maxProperties": ids.LABELS_MAX})]

RolloutAction = Literal["approve", "pause", "resume", "advance", "abort", "rollback", "retry"]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body or the query of a URL."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """An answer."""


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """Part of a list. `next` is what to send as `after` for the following part; null at the end."""

    items: tuple[T, ...]
    next: str | None = None


class Problem(View, frozen=True, kw_only=True):
    """An error (RFC 9457). `code` is stable and for programs, `detail` and `fix` are for people, `field` is the path of
    the input that is wrong.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = None
    fix: str | None = None
    trace_id: str | None = None


# Queries


class PageQuery(Request, frozen=True, kw_only=True):
    """Which part of a list."""

    after: Annotated[str, Meta(max_length=TEXT_CHARS_MAX)] = ""
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT_MAX)] = PAGE_LIMIT


class DeviceQuery(PageQuery, frozen=True, kw_only=True):
    """`selector` is an expression over a device's facts."""

    selector: str = "true"


class ReleaseQuery(PageQuery, frozen=True, kw_only=True):
    """`model` keeps one model's releases."""

    model: str | None = None


class PatchQuery(Request, frozen=True, kw_only=True):
    """`target` is the artifact that the patches rebuild."""

    target: GivenDigest


class EventQuery(Request, frozen=True, kw_only=True):
    """`kind` keeps one kind, or a whole family: `rollout` means every `rollout.*`. `subject` keeps one subject.

    `after` is the last event seen, for clients that cannot send Last-Event-ID; by default the stream begins now.
    """

    kind: str = ""
    subject: str = ""
    after: Annotated[int, Meta(ge=0)] | None = None


class RolloutQuery(Request, frozen=True, kw_only=True):
    """`dry_run` answers with a preview and changes nothing."""

    dry_run: bool = False


# Releases and blobs


class BlobView(View, frozen=True, kw_only=True):
    """Bytes that the registry holds."""

    digest: Digest
    size: int


class GivenSelfTest(Request, frozen=True, kw_only=True):
    """The self-test of a variant: the digest of its samples, uploaded before (docs/reference/samples-format.md), a rule
    for each output that is compared, and what the best of a few runs of a sample may take on a device, in seconds.
    """

    samples: GivenDigest
    rules: Annotated[dict[str, Rule], Meta(min_length=1, max_length=RULES_MAX)]
    latency_max_s: Annotated[float, Meta(gt=0, le=LATENCY_S_MAX)] | None = None


class GivenPipeline(Request, frozen=True, kw_only=True):
    """The steps before and after the model of a variant, and the tensors that callers send and get."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    before: Steps = ()
    after: Steps = ()


class PublishRelease(Request, frozen=True, kw_only=True):
    """A release made of blobs that were uploaded before: variant -> file name -> digest.

    A variant is one ONNX file, whose name ends in `.onnx` if it has company, and exactly the files that it keeps
    weights in (external data), under the names that it knows them by. The rest is by variant: the shared libraries in
    `custom_ops` as file name -> digest, `serving` as docs/reference/serving-file.md describes it, `references` as
    digests of files that say how usual data is distributed (docs/reference/drift.md).
    """

    model: GivenModel
    version: GivenVersion
    variants: Annotated[dict[str, GivenFiles], Meta(min_length=1, max_length=VARIANTS_MAX)]
    self_tests: Annotated[dict[str, GivenSelfTest], Meta(max_length=VARIANTS_MAX)] = {}
    pipelines: Annotated[dict[str, GivenPipeline], Meta(max_length=VARIANTS_MAX)] = {}
    custom_ops: Annotated[dict[str, GivenFiles], Meta(max_length=VARIANTS_MAX)] = {}
    serving: Annotated[dict[str, GivenServing], Meta(max_length=VARIANTS_MAX)] = {}
    references: Annotated[dict[str, GivenDigest], Meta(max_length=VARIANTS_MAX)] = {}


class ReleaseView(View, frozen=True, kw_only=True):
    """A published release. `envelope` names its signed manifest among the blobs."""

    model: ModelName
    version: Version
    manifest: ReleaseManifest
    envelope: ArtifactRef
    published_at: float
    published_by: str

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"


class PatchView(View, frozen=True, kw_only=True):
    """A patch between two artifacts, or why there is none worth sending."""

    base: Digest
    target: Digest
    codec: str
    state: PatchState
    created_at: float
    patch: ArtifactRef | None = None
    reason: str = ""


class TelemetryQuery(Request, frozen=True, kw_only=True):
    """`since_s` is how far back to look, in seconds; `device` keeps what one device measured."""

    since_s: Annotated[float, Meta(gt=0, le=TELEMETRY_S_MAX)] = TELEMETRY_S
    device: str | None = None


class RunsView(View, frozen=True, kw_only=True):
    """Runs of the engine: `count` of them with `rows` rows in `seconds`. `by_rows` counts them by the rows in each: up
    to 1, 2, 4, 8, 16, 32, 64, and more.
    """

    count: int
    rows: int
    seconds: float
    by_rows: tuple[int, ...]


class UsageView(View, frozen=True, kw_only=True):
    """What the agents' processes used while the release was asked, whatever else they served: `cpu_s` seconds of CPU
    time in `seconds`, over `devices`. `windows_lost` is telemetry that never came, `files_bad` are installed files that
    went bad on a disk.
    """

    devices: int
    seconds: float
    cpu_s: float
    rss_bytes_max: int
    pss_bytes_max: int
    windows_lost: int
    files_bad: int
    files_mended: int


class VariantView(View, frozen=True, kw_only=True):
    """What devices of a class found of a variant: the median seconds of a run over `devices`, of which some `failed`;
    null where none was measured or half of them failed.
    """

    device_class: str
    variant: str
    devices: int
    failed: int
    run_s: float | None


class TelemetryView(View, frozen=True, kw_only=True):
    """What devices measured of a release: requests, failures, and how long callers waited (seconds; null of nothing).

    The quantiles are estimates from histogram buckets. `errors` are requests that the release failed, whether or not
    another release could answer in its place. `refused` (no room), `expired` (too late) and `cancelled` (the caller
    left) requests were never run and are not in `requests`. `drift` has an entry for each reference that was counted
    by: one, or one for each variant; `drift_verdict` is `inconclusive` without any. `variants` are what devices
    measured that leave their variant to measurement, whenever that was.
    """

    model: ModelName
    version: Version
    since: float
    devices: int
    requests: int
    errors: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    queue_p50_s: float | None
    queue_p99_s: float | None
    queue_max_s: float | None
    refused: int
    expired: int
    cancelled: int
    runs: RunsView
    usage: UsageView
    accuracy: Accuracy
    drift_verdict: Verdict
    drift: tuple[Drift, ...]
    variants: tuple[VariantView, ...]

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"


class CollectGarbage(Request, frozen=True, kw_only=True):
    """Remove blobs that nothing needs and that arrived at least `min_age_s` ago (an upload may still be published)."""

    min_age_s: Annotated[float, Meta(ge=0)] = GARBAGE_AGE_S


class CollectedView(View, frozen=True, kw_only=True):
    """What was removed: blobs and their bytes."""

    count: int
    bytes: int


# Devices


class DeviceView(View, frozen=True, kw_only=True):
    """A device and its twin: what it should run (`assigned`), what it says it runs (`reported`). `chosen` are variants
    that measurement has decided, and why.
    """

    id: DeviceId
    created_at: float
    labels: dict[str, str]
    presence: Presence
    in_sync: bool
    last_seen: float | None
    assigned: dict[ModelName, Version]
    chosen: dict[ModelName, Chosen]
    generation: int
    capabilities: Capabilities | None
    heartbeat: Heartbeat | None
    reported: ReportedState | None
    revision: int

    @property
    def name(self) -> str:
        return self.id


class RelabelDevice(Request, frozen=True, kw_only=True):
    """A merge patch (RFC 7396) of the labels: null removes one."""

    labels: dict[LabelKey, LabelValue | None]


class CreateJoinToken(Request, frozen=True, kw_only=True):
    """A claim that lets `uses` devices in within `ttl_s`; they get `labels`."""

    uses: Annotated[int, Meta(ge=1, le=JOIN_USES_MAX)] = 1
    ttl_s: Annotated[float, Meta(gt=0, le=JOIN_TTL_S_MAX)] = JOIN_TTL_S
    labels: Labels = {}


class JoinTokenView(View, frozen=True, kw_only=True):
    """A claim, without its secret."""

    id: str
    created_at: float
    expires_at: float | None
    uses_left: int | None
    labels: dict[str, str]

    @property
    def name(self) -> str:
        return self.id


class JoinTokenCreated(JoinTokenView, frozen=True, kw_only=True):
    """A new claim; `join_string` is shown this once."""

    join_string: str


class Join(Request, frozen=True, kw_only=True):
    """A machine that wants in. `name` is the device id it would like; without one it gets a random one."""

    name: Annotated[str, _described(ids.DEVICE_ID)] | None = None
    labels: Labels = {}
    capabilities: Capabilities


class BrokerAccess(View, frozen=True, kw_only=True):
    """How a device reaches the broker."""

    url: str
    username: str
    password: str


class Joined(View, frozen=True, kw_only=True):
    """Everything a new device keeps: who it is, its credentials, whose orders to believe, how often to call."""

    device: DeviceId
    device_token: str
    broker: BrokerAccess
    signing_keys: tuple[PublicKey, ...]
    heartbeat_s: float
    poll_s: float


# Rollouts


class RolloutActionRequest(Request, frozen=True, kw_only=True):
    """What to do with a rollout."""

    action: RolloutAction


class PhaseView(View, frozen=True, kw_only=True):
    """One phase: what was asked, where it stands, and how many of its own devices are in each state."""

    index: int
    spec: PhaseSpec
    state: PhaseState
    approved: bool
    started_at: float | None
    baking_since: float | None
    finished_at: float | None
    reason: str
    devices: int
    counts: dict[ExecutionState, int]


class RolloutView(View, frozen=True, kw_only=True):
    """A rollout and how far it has come; `counts` are devices by state of their execution."""

    id: str
    spec: RolloutSpec
    state: RolloutState
    reason: str
    phases: tuple[PhaseView, ...]
    devices: int
    counts: dict[ExecutionState, int]
    created_at: float
    created_by: str
    finished_at: float | None
    traceparent: str | None
    revision: int

    @property
    def name(self) -> str:
        return self.id

    @property
    def release(self) -> str:
        return str(self.spec.release)


# The controller itself


class HealthView(View, frozen=True, kw_only=True):
    """Whether the controller serves, and how its parts are."""

    status: Literal["ok", "degraded"]
    version: str
    parts: dict[str, str] = {}


__all__ = [
    "GARBAGE_AGE_S",
    "JOIN_TTL_S",
    "PAGE_LIMIT",
    "PAGE_LIMIT_MAX",
    "BlobView",
    "BrokerAccess",
    "CollectGarbage",
    "CollectedView",
    "CreateJoinToken",
    "DeviceQuery",
    "DeviceView",
    "EventQuery",
    "HealthView",
    "Join",
    "JoinTokenCreated",
    "JoinTokenView",
    "Joined",
    "OnFailure",
    "Page",
    "PageQuery",
    "PatchQuery",
    "PatchView",
    "PhaseView",
    "Problem",
    "PublishRelease",
    "RelabelDevice",
    "ReleaseQuery",
    "ReleaseView",
    "RolloutAction",
    "RolloutActionRequest",
    "RolloutQuery",
    "RolloutView",
    "TelemetryQuery",
    "TelemetryView",
]
