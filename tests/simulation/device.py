"""A simulated agent with one model: follows orders as the wire protocol says, in stages, and reports how things are.

What it has learnt from an order survives a reboot (a real agent keeps a journal); a broken transfer is tried again and
is no verdict. It chooses its way to a release as a real agent does, and keeps to the order's byte budget. `Flaw` says
how a release misbehaves when it is run.
"""

from enum import StrEnum

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from common.delta import CODECS
from common.ids import DeviceId, Digest, Version
from common.wire import (
    Capabilities,
    DesiredModel,
    DesiredState,
    Heartbeat,
    Outcome,
    Presence,
    ReportedModel,
    ReportedState,
    UpdatePhase,
    UpdateReport,
)
from edge_agent.update.choice import Local, TooDear, choose

WAITS = "waits for a cheaper way"
CAPABILITIES = Capabilities(agent_version="1", patch_codecs=CODECS)


class Flaw(StrEnum):
    NONE = "none"
    UNLOADABLE = "unloadable"
    UNHEALTHY = "unhealthy"
    MUTE = "mute"
    """The device dies with it, some time after it began to serve."""


class Kind(msgspec.Struct, frozen=True):
    """How devices of a class are built: seconds of a run by variant, and the variants that they cannot load."""

    name: str
    run_s: dict[str, float]
    unloadable: frozenset[str] = frozenset()

    @property
    def capabilities(self) -> Capabilities:
        return replace(CAPABILITIES, variants=("auto",), device_class=self.name)


class SimulatedDevice:
    """One agent. `step` takes its work one stage further; `birth`, `death`, `heartbeat` and `report` are messages.

    With a `kind` it leaves its variant to measurement.
    """

    def __init__(self, device: DeviceId, flaws: dict[Version, Flaw], kind: Kind | None = None) -> None:
        self.id = device
        self.flaws = flaws
        self.kind = kind
        self.capabilities = kind.capabilities if kind else CAPABILITIES
        self.online = False
        self.dead = False
        self.epoch = 0
        self.seq = 0
        self.generation = 0
        self.entry: ReportedModel | None = None
        self.target: DesiredModel | None = None
        self.fallback: tuple[Version | None, Digest | None] = (None, None)
        self.files: dict[Digest, tuple[Digest, ...]] = {}
        """All files of the releases that it has fetched, by their ONNX file."""

    @property
    def running(self) -> Version | None:
        return self.entry.running if self.entry else None

    def follow(self, desired: DesiredState) -> None:
        """Accept an order, unless it is not newer."""
        if desired.generation <= self.generation:
            return
        self.generation = desired.generation
        if not desired.models:
            self.entry, self.target = None, None
            return
        (model,) = desired.models
        entry = self.entry or ReportedModel(model=model.model, running=None, artifact=None, phase="idle", generation=0)
        if model.order <= entry.generation:
            if self.target is not None and model.order == self.target.order:
                self.target = model  # there may be other ways to it now
            return
        if entry.phase == "probation":
            entry = replace(entry, running=self.fallback[0], artifact=self.fallback[1])
        if entry.running == model.version and entry.artifact == model.artifact.digest:
            self.target = None
            self.entry = replace(entry, phase="idle", target=None, generation=model.order)
            return
        self.target = model
        self.entry = replace(entry, phase="fetching", target=model.version, generation=model.order)

    def step(self, now: float, transfer_broke: bool = False) -> None:
        """One stage further."""
        if self.entry is None or self.target is None:
            return
        flaw = self.flaws.get(self.target.version, Flaw.NONE)
        match self.entry.phase:
            case "fetching" if transfer_broke:
                pass
            case "fetching":
                self._fetch(self.target, now)
            case "warming" if flaw is Flaw.UNLOADABLE or (self.kind and self.target.variant in self.kind.unloadable):
                self._finish("failed", now)
            case "warming":
                self.fallback = (self.entry.running, self.entry.artifact)
                artifact = self.target.artifact.digest
                self.entry = replace(
                    self.entry, phase="probation", running=self.target.version, artifact=artifact, activated_at=now
                )
            case "probation" if flaw is Flaw.MUTE:
                self.dead, self.online = True, False
            case "probation" if flaw is Flaw.UNHEALTHY:
                self.entry = replace(self.entry, running=self.fallback[0], artifact=self.fallback[1])
                self._finish("rolled_back", now)
            case "probation":
                self._finish("succeeded", now)

    def reboot(self) -> None:
        """A power cut: an unfinished probation begins again, from what ran before."""
        self.online = False
        if self.entry is not None and self.entry.phase == "probation":
            self.entry = replace(self.entry, running=self.fallback[0], artifact=self.fallback[1], phase="warming")

    def birth(self, now: float) -> Presence:
        self.online = True
        self.epoch += 1
        self.seq = 0
        return Presence(
            device=self.id, epoch=self.epoch, seq=0, sent_at=now, online=True, capabilities=self.capabilities
        )

    def death(self, now: float) -> Presence:
        return Presence(device=self.id, epoch=self.epoch, seq=0, sent_at=now, online=False)

    def heartbeat(self, now: float) -> Heartbeat:
        return Heartbeat(
            device=self.id,
            epoch=self.epoch,
            seq=self._next(),
            sent_at=now,
            uptime_s=0,
            load_1m=0,
            cpu_percent=0,
            memory_bytes=0,
            memory_available_bytes=0,
            disk_bytes=0,
            disk_free_bytes=0,
            generation=self.generation,
            running={},
        )

    def report(self, now: float) -> ReportedState:
        return ReportedState(
            device=self.id,
            epoch=self.epoch,
            seq=self._next(),
            sent_at=now,
            generation=self.generation,
            models=(self.entry,) if self.entry else (),
            held=self.held(),
        )

    def held(self) -> tuple[Digest, ...]:
        """The files of the release that runs, and of the one before it."""
        models = (self.entry.artifact, self.fallback[1]) if self.entry else ()
        return tuple(dict.fromkeys(file for model in models if model is not None for file in self.files[model]))

    def _fetch(self, target: DesiredModel, now: float) -> None:
        """All of it at once, if it fits the budget; otherwise wait for a newer order, or fail."""
        plan = choose(target, Local(frozenset(self.held()), CAPABILITIES.patch_codecs))
        if not isinstance(plan, TooDear):
            self.files[target.artifact.digest] = tuple(file.artifact.digest for file in target.files)
            self._enter("warming")
        elif target.on_exceed == "fail":
            self._finish("failed", now, "over_budget")
        else:
            self._enter("fetching", WAITS)

    def _enter(self, phase: UpdatePhase, detail: str = "") -> None:
        assert self.entry is not None
        self.entry = replace(self.entry, phase=phase, detail=detail)

    def _finish(self, outcome: Outcome, now: float, reason: str = "") -> None:
        assert self.entry is not None
        assert self.target is not None
        update = UpdateReport(
            generation=self.target.order,
            version=self.target.version,
            outcome=outcome,
            reason=reason,
            finished_at=now,
        )
        if self.target.measure and self.kind:
            run_s = self.kind.run_s[self.target.variant] if outcome == "succeeded" else UNSET
            update = replace(update, variant=self.target.variant, run_s=run_s)
        phase: UpdatePhase = "idle" if outcome == "succeeded" else "failed"
        self.entry = replace(self.entry, phase=phase, target=None, last_update=update)
        self.target = None

    def _next(self) -> int:
        self.seq += 1
        return self.seq
