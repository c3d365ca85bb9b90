"""Devices, releases and rollouts for tests of decisions, made of plain values."""

from collections.abc import Iterable

from msgspec.structs import replace

from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of
from common.ids import DeviceId, Digest, ModelName, ReleaseRef, Version
from common.wire import Capabilities, Outcome, ReportedModel, ReportedState, UpdatePhase, UpdateReport
from controller.devices import Device
from controller.rollouts.model import Execution, ExecutionState, Phase, PhaseState, Rollout, RolloutSpec, RolloutState
from controller.rollouts.patching import Lineage
from controller.rollouts.planner import Action, Notify, Revert, Snapshot, UpdateExecution, UpdateRollout, plan

MODEL = ModelName("m")
V1, V2 = Version("1"), Version("2")
NOW = 1_000_000.0
CODEC = "c.1"
SIZE = 1000


def artifact(version: Version) -> ArtifactRef:
    return ArtifactRef(digest_of(version.encode()), SIZE)


LINEAGE = Lineage(bases={artifact(V2).digest: {artifact(V1).digest}}, codecs=(CODEC,))
"""V2 may be built from V1."""


def manifest(version: Version = V2, variants: Iterable[str] = ("default",)) -> ReleaseManifest:
    return ReleaseManifest(
        MODEL, version, {name: Variant({"model.onnx": artifact(version)}, "model.onnx", (), ()) for name in variants}
    )


def device(name: str = "d0", **changes: object) -> Device:
    """A device that is online and was told to run V1."""
    plain = Device(
        id=DeviceId(name),
        created_at=0,
        capabilities=Capabilities(agent_version="1", patch_codecs=(CODEC,)),
        connected=True,
        epoch=1,
        last_seen=NOW,
        assigned={MODEL: V1},
        generation=1,
    )
    return replace(plain, **changes)


def saying(
    told: Device,
    *,
    running: Version | None = V1,
    phase: UpdatePhase = "idle",
    target: Version | None = None,
    generation: int = 1,
    outcome: Outcome | None = None,
    update_version: Version = V2,
    held: tuple[Digest, ...] = (),
    detail: str = "",
) -> Device:
    """The device with a report of these words."""
    update = outcome and UpdateReport(generation=generation, version=update_version, outcome=outcome, reason="why")
    entry = ReportedModel(
        model=MODEL,
        running=running,
        artifact=None,
        phase=phase,
        target=target,
        generation=generation,
        detail=detail,
        last_update=update or None,
    )
    report = ReportedState(
        device=told.id, epoch=1, seq=generation, sent_at=0, generation=generation, models=(entry,), held=held
    )
    return replace(told, reported=report)


def told(name: str = "d0", state: ExecutionState = ExecutionState.NOTIFIED, **changes: object) -> Execution:
    """A part that has its order, generation 2."""
    plain = Execution(
        device=DeviceId(name), phase=0, state=state, previous=V1, generation=2, notified_at=NOW, activated_at=None
    )
    return replace(plain, **changes)


def rollout(
    *phases: PhaseState, state: RolloutState = RolloutState.RUNNING, spec: RolloutSpec | None = None
) -> Rollout:
    """A rollout of V2 with these phases, begun at NOW."""
    return Rollout(
        id="r1",
        spec=spec or a_spec(),
        salt="s",
        created_at=NOW,
        created_by="test",
        state=state,
        phases=tuple(
            Phase(
                index=index,
                state=phase,
                started_at=None if phase is PhaseState.PENDING else NOW,
                baking_since=NOW if phase is PhaseState.BAKING else None,
                finished_at=NOW if phase is PhaseState.PASSED else None,
            )
            for index, phase in enumerate(phases or (PhaseState.DEPLOYING,))
        ),
    )


def a_spec(**changes: object) -> RolloutSpec:
    plain = RolloutSpec(release=ReleaseRef(MODEL, V2), bake_s=60, silence_s=100, straggler_s=200)
    return replace(plain, **changes)


def snapshot(of: Rollout, executions: Iterable[Execution], devices: Iterable[Device], **changes: object) -> Snapshot:
    plain = Snapshot(
        rollout=of,
        executions=tuple(executions),
        devices={one.id: one for one in devices},
        manifest=manifest(),
        listening_since=0.0,
    )
    return replace(plain, **changes)


def settled(start: Snapshot, now: float) -> Snapshot:
    """The snapshot after planning and storing until nothing is left to do; orders reach devices' assignments."""
    for _ in range(50):
        actions = plan(start, now)
        if not actions:
            return start
        start = stored(start, actions)
    raise AssertionError("the planner never comes to rest")


def stored(before: Snapshot, actions: Iterable[Action]) -> Snapshot:
    """The snapshot with the actions carried out."""
    executions = {one.device: one for one in before.executions}
    devices = dict(before.devices)
    after = before.rollout
    for action in actions:
        if isinstance(action, UpdateRollout):
            after = action.rollout
        if isinstance(action, Notify | Revert | UpdateExecution):
            executions[action.execution.device] = action.execution
        if isinstance(action, Notify | Revert):
            known = devices[action.execution.device]
            assigned = {MODEL: action.version} if action.version else {}
            devices[known.id] = replace(known, assigned=assigned, generation=action.execution.generation)
    return replace(before, rollout=after, executions=tuple(executions.values()), devices=devices)
