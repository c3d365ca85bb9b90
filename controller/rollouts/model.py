"""The words of a gradual release: rollout, phase, execution, and the states they can be in.

A rollout brings one release to the devices that its selector matched when it was created. Its phases widen step by
step; the membership of a device in a phase is drawn by a hash of the rollout's salt and the device id, so widening
keeps the devices that were already in. An execution is one device's part in the rollout.
"""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from common.ids import DeviceId, ReleaseRef, Version
from common.wire import OnExceed, Shadow, Split
from common.wire.messages import COUNT_MAX
from controller.variants import Chosen

PHASES_MAX = 32
SELECTOR_CHARS_MAX = 1024


class RolloutState(StrEnum):
    PREPARING = "preparing"
    """Patches are being built; nobody has been told."""
    AWAITING_APPROVAL = "awaiting_approval"
    """The next phase wants a person's word."""
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    ABORTED = "aborted"
    """Stopped for good; devices stay as they are."""
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"


TERMINAL_ROLLOUT_STATES = frozenset({RolloutState.SUCCEEDED, RolloutState.ABORTED, RolloutState.ROLLED_BACK})


class PhaseState(StrEnum):
    PENDING = "pending"
    DEPLOYING = "deploying"
    BAKING = "baking"
    PASSED = "passed"
    FAILED = "failed"


class ExecutionState(StrEnum):
    QUEUED = "queued"
    """In the rollout, not told yet."""
    NOTIFIED = "notified"
    """Ordered; the device has not begun."""
    IN_PROGRESS = "in_progress"
    """The device fetches, verifies or warms the release; it still serves the old one."""
    PROBATION = "probation"
    """The device serves the release and watches itself."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """The device gave up, put the old release back, refused the order, or went silent after activation."""
    REVERTING = "reverting"
    """The rollout is being taken back; the device has its order and has not said that it obeyed."""
    ROLLED_BACK = "rolled_back"
    """The rollout was taken back and the device says so."""
    CANCELED = "canceled"
    """The device was not told: the rollout ended first, or no variant of the release fits it."""
    SUPERSEDED = "superseded"
    """A newer rollout of the same model took the device over."""


TERMINAL_EXECUTION_STATES = frozenset(
    {
        ExecutionState.SUCCEEDED,
        ExecutionState.FAILED,
        ExecutionState.ROLLED_BACK,
        ExecutionState.CANCELED,
        ExecutionState.SUPERSEDED,
    }
)


class OnFailure(StrEnum):
    """What a rollout does when its error budget is spent."""

    ROLLBACK = "rollback"
    PAUSE = "pause"
    ABORT = "abort"


class ErrorBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Failures that a phase tolerates: more than this fails it.

    The larger of `count` and `percent` of the resolved devices (succeeded or failed) is tolerated. The ratio is taken
    once `minimum` devices are resolved, or once nobody is left to wait for; `count` alone needs no minimum.
    """

    percent: Annotated[float, Meta(ge=0, le=100)] = 0.0
    count: Annotated[int, Meta(ge=0)] = 0
    minimum: Annotated[int, Meta(ge=1)] = 1


class PhaseSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One step, cumulative: exactly one of `percent` (0 < p <= 100), `count` or `selector` says how far it reaches."""

    percent: Annotated[float, Meta(gt=0, le=100)] | None = None
    count: Annotated[int, Meta(ge=1)] | None = None
    selector: Annotated[str, Meta(max_length=SELECTOR_CHARS_MAX)] | None = None
    bake_s: Annotated[float, Meta(ge=0)] | None = None
    """Overrides the rollout's."""
    approval: bool = False
    """Whether a person must approve before this phase begins."""


class ShadowSpec(Shadow, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """How each device tries the release on live requests before it answers any; see the wire's `Shadow`."""


class SplitSpec(Split, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Who answers while the release is in probation; see the wire's `Split`."""


class RolloutSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator asks for."""

    release: ReleaseRef
    selector: Annotated[str, Meta(max_length=SELECTOR_CHARS_MAX)] = "true"
    phases: Annotated[tuple[PhaseSpec, ...], Meta(min_length=1, max_length=PHASES_MAX)] = (PhaseSpec(percent=100),)
    bake_s: Annotated[float, Meta(ge=0)] = 60.0
    """How long a phase is watched after its devices have resolved, in seconds."""
    probation_s: Annotated[float, Meta(ge=0, le=86_400)] = 30.0
    """How long each device watches itself before it commits, in seconds."""
    silence_s: Annotated[float, Meta(gt=0)] = 180.0
    """A device not heard from for this long after activation counts as failed."""
    straggler_s: Annotated[float, Meta(gt=0)] = 600.0
    """A device that has not activated this long after it was told (and the shadow time) no longer holds the phase up.
    """
    max_bytes: Annotated[int, Meta(ge=1, le=COUNT_MAX)] | None = None
    """The most bytes that the update may move over the network to each device, manifest included; null: any number."""
    on_exceed: OnExceed = "defer"
    """What a device does that cannot keep to `max_bytes`: wait for a cheaper way, or fail (reason `over_budget`)."""
    shadow: ShadowSpec | None = None
    """Devices try the release on live requests before the switch; null: they do not."""
    split: SplitSpec | None = None
    """In probation the release answers a share of the requests; null: all of them."""
    error_budget: ErrorBudget = ErrorBudget()
    on_failure: OnFailure = OnFailure.ROLLBACK

    @property
    def patience_s(self) -> float:
        """How long a device may take to activate the release after it was told before nobody waits for it any more."""
        return self.straggler_s + (self.shadow.for_s if self.shadow else 0.0)


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One phase under way."""

    index: int
    state: PhaseState = PhaseState.PENDING
    approved: bool = False
    started_at: float | None = None
    baking_since: float | None = None
    finished_at: float | None = None
    reason: str = ""


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part.

    `phase` is the index of the first phase the device belongs to; `previous` what the device was assigned before, so
    that it can be given back (it means nothing while `generation` is 0); `generation` the newest order that this
    rollout made for the device.
    """

    device: DeviceId
    phase: int
    state: ExecutionState = ExecutionState.QUEUED
    previous: Version | None = None
    generation: int = 0
    notified_at: float | None = None
    activated_at: float | None = None
    finished_at: float | None = None
    reason: str = ""
    detail: str = ""
    """What the device waits for, or how it failed, in its own words."""
    attempt: int = 1
    chosen: Chosen | None = None
    """The variant that was chosen for the device by measurement; null where the device says itself what it wants."""
    previous_chosen: Chosen | None = None
    """The same of `previous`, so that it is given back as it was."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A gradual release under way. `revision` grows with every change (the ETag)."""

    id: str
    spec: RolloutSpec
    salt: str
    created_at: float
    created_by: str
    state: RolloutState = RolloutState.PREPARING
    phases: tuple[Phase, ...] = ()
    reason: str = ""
    """Why it is where it is, as a sentence for people."""
    finished_at: float | None = None
    traceparent: str | None = None
    revision: int = 1


class PhasePreview(msgspec.Struct, frozen=True, kw_only=True):
    """What one phase adds. `devices` = `unchanged` + `patched` + `full` + `unfit`; `undecided` are among `full`.

    `unchanged` hold the bytes already, `patched` need fewer than all (by patches, parts, or files that they have),
    `unfit` are devices that no variant fits. `bytes` cross the network, `full_bytes` would without patches; manifests
    and orders (a few kB a device) are not counted. `over_budget` need more than `max_bytes`, with their manifest.
    """

    index: int
    devices: int = 0
    online: int = 0
    unchanged: int = 0
    patched: int = 0
    full: int = 0
    undecided: int = 0
    unfit: int = 0
    over_budget: int = 0
    bytes: int = 0
    full_bytes: int = 0


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout would do; the members of a phase are drawn anew when it is created, their number stays."""

    devices: int
    online: int
    bytes: int
    full_bytes: int
    phases: tuple[PhasePreview, ...]
