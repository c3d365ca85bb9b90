"""Rollouts as units of work: load what a decision needs, store what it decided.

`create_rollout`, `act_on_rollout` and `preview_rollout` are what the API calls; `load_snapshot` and `commit` are the
two halves of the reconciler's work around `rollouts.planner.plan`. Each runs inside one transaction and emits events
(`rollout.created`, `rollout.updated`, `execution.updated`); whoever calls for a person writes the audit entry.
"""

from collections.abc import Iterable, Iterator
from typing import assert_never

from msgspec.structs import replace

from common.artifact import ReleaseManifest, Variant
from common.delta import CODECS
from common.errors import Conflict, IntegrityFailure, NotFound
from common.ids import DeviceId, ModelName, ReleaseRef
from common.trust import Signer
from controller.devices import Device, class_of, is_measured, next_generation
from controller.measurements import findings_in
from controller.orders import Terms, Ways, improvable, load_catalogue, make_order
from controller.rollouts import commands
from controller.rollouts.judgement import OPEN
from controller.rollouts.model import Execution, ExecutionState, Preview, Rollout, RolloutSpec
from controller.rollouts.patching import Lineage, PatchKey, bases_of, wanted_patches
from controller.rollouts.planner import (
    Action,
    Notify,
    Renew,
    RequestPatch,
    Revert,
    Snapshot,
    UpdateExecution,
    UpdateRollout,
    watched,
)
from controller.rollouts.preview import preview
from controller.store.port import Event, Patch, Transaction
from controller.variants import Chosen, Findings

RELEASES_PER_PAGE = 200
SCAN_FROM_DEVICES = 500
"""Beyond so many devices, one pass over the fleet is cheaper than a look-up each."""


def create_rollout(
    tx: Transaction,
    spec: RolloutSpec,
    *,
    id: str,  # noqa: A002 - it is the id, and it is keyword-only
    salt: str,
    actor: str,
    now: float,
    traceparent: str | None = None,
) -> Rollout:
    """Store a new rollout (ids must sort by time), ending the older ones it supersedes; raises as `commands.create`."""
    created = commands.create(
        spec,
        tx.devices.all(),
        now=now,
        id=id,
        salt=salt,
        actor=actor,
        exists=lambda release: tx.releases.get(release) is not None,
        active=_active_of(tx, spec.release.model),
        traceparent=traceparent,
    )
    for rollout, executions in created.superseded:
        _store(tx, rollout, executions, now)
    tx.rollouts.put(created.rollout)
    tx.rollouts.put_executions(id, created.executions)
    data: dict[str, object] = {"release": str(spec.release), "devices": len(created.executions)}
    tx.journal.append_event(Event(kind="rollout.created", subject=id, at=now, data=data))
    return created.rollout


def act_on_rollout(tx: Transaction, rollout_id: str, action: commands.Action, *, now: float) -> Rollout:
    """Do what a person asks of a rollout. Raises `NotFound`, and `Conflict` when the action is not possible now."""
    rollout = tx.rollouts.get(rollout_id)
    if rollout is None:
        raise NotFound(f"no rollout {rollout_id[:80]!r}", field="rollout", fix="see: ferry rollout list")
    executions = tx.rollouts.executions(rollout_id)
    if action == "rollback":
        commands.refuse_rollback_over(rollout, executions, _active_of(tx, rollout.spec.release.model))
    after, changed = commands.act(rollout, executions, action, now)
    _store(tx, after, changed, now)
    return after


def preview_rollout(tx: Transaction, spec: RolloutSpec, *, salt: str, now: float) -> Preview:
    """What a rollout would do; writes nothing. Raises as `create_rollout` does."""
    release = tx.releases.get(spec.release)
    if release is None:
        fix = "publish it first: ferry release publish"
        raise NotFound(f"release {spec.release} does not exist", field="release", fix=fix)
    devices = list(tx.devices.all())
    files = {file for variant in release.manifest.variants.values() for file in variant.files.values()}
    held = {digest for device in devices if device.reported for digest in device.reported.held}
    return preview(
        spec,
        devices,
        manifest=release.manifest,
        envelope=release.envelope,
        lineage=_lineage(tx, release.manifest, devices),
        catalogue=load_catalogue(tx, files, held),
        found=_found(tx, release.manifest, devices),
        salt=salt,
        now=now,
    )


def load_snapshot(tx: Transaction, rollout: Rollout, listening_since: float | None) -> Snapshot:
    """Everything that `plan` needs to know about `rollout` now."""
    release = tx.releases.get(rollout.spec.release)
    if release is None:
        raise IntegrityFailure(f"rollout {rollout.id}: its release {rollout.spec.release} is not in the store")
    executions = tuple(tx.rollouts.executions(rollout.id))
    devices = _devices(tx, frozenset(watched(rollout, executions)))
    told = [devices[one.device] for one in executions if one.state in OPEN and one.device in devices]
    queued = [devices[one.device] for one in executions if one.state is ExecutionState.QUEUED and one.device in devices]
    waiting = told if rollout.spec.max_bytes is not None else []
    found = _found(tx, release.manifest, queued)
    return Snapshot(
        rollout=rollout,
        executions=executions,
        devices=devices,
        manifest=release.manifest,
        lineage=_lineage(tx, release.manifest, [*queued, *waiting]),
        listening_since=listening_since,
        improvable=improvable(tx, waiting, rollout.spec.release.model),
        found=found,
        elsewhere=_elsewhere(tx, rollout) if found else (),
    )


def has_open_ends(tx: Transaction, rollout_id: str) -> bool:
    """Whether devices that were told have not said how it ended."""
    return any(execution.state in OPEN for execution in tx.rollouts.executions(rollout_id))


def commit(
    tx: Transaction, rollout: Rollout, actions: Iterable[Action], *, signer: Signer, now: float, traceparent: str | None
) -> None:
    """Store what a plan decided about `rollout`; orders are made and signed here, and sent later."""
    executions: dict[DeviceId, Execution] = {}
    ways = Ways(tx)
    for action in actions:
        match action:
            case Notify() | Revert():
                device = _reassigned(tx, rollout.spec.release.model, action)
                make_order(
                    tx,
                    device,
                    signer,
                    now=now,
                    changed=rollout.spec.release.model,
                    terms=_terms(rollout.spec, action),
                    traceparent=traceparent,
                    ways=ways,
                )
                executions[action.execution.device] = action.execution
            case UpdateExecution():
                executions[action.execution.device] = action.execution
            case UpdateRollout():
                rollout = action.rollout
            case RequestPatch():
                _request_patch(tx, action.key, now)
            case Renew():
                known = tx.devices.get(action.device)
                if known is not None:  # it has not left the fleet since
                    make_order(tx, known, signer, now=now, traceparent=traceparent, ways=ways)
            case _:
                assert_never(action)
    _store(tx, rollout, list(executions.values()), now)


def _reassigned(tx: Transaction, model: ModelName, action: Notify | Revert) -> Device:
    """The device with what the action wants it to run."""
    execution = action.execution
    device = tx.devices.get(execution.device)
    if device is None or next_generation(device) != execution.generation:
        raise Conflict(f"{execution.device} was given another order since this plan was made")
    assigned = {name: version for name, version in device.assigned.items() if name != model}
    chosen = {name: known for name, known in device.chosen.items() if name != model}
    if action.version is not None:
        assigned[model] = action.version
    if (choice := _choice(action)) is not None:
        chosen[model] = choice
    return replace(device, assigned=assigned, chosen=chosen)


def _terms(spec: RolloutSpec, action: Notify | Revert) -> Terms:
    """What a release that is taken back is replaced by is proven, and wanted at once: it is not compared or shared."""
    going_back = isinstance(action, Revert)
    return Terms(
        probation_s=spec.probation_s,
        max_bytes=spec.max_bytes,
        on_exceed=spec.on_exceed,
        shadow=None if going_back else spec.shadow,
        split=None if going_back else spec.split,
        variant=choice.variant if (choice := _choice(action)) else None,
        measure=choice is not None and not going_back,
    )


def _choice(action: Notify | Revert) -> Chosen | None:
    """The variant that was chosen for what the device is ordered."""
    return action.execution.chosen if isinstance(action, Notify) else action.execution.previous_chosen


def _request_patch(tx: Transaction, key: PatchKey, now: float) -> None:
    known = tx.patches.get(key.base, key.target, key.codec)
    if known is None:
        tx.patches.put(Patch(base=key.base, target=key.target, codec=key.codec, state="pending", created_at=now))
    elif known.may_be_asked_again:
        tx.patches.put(known.to_be_built())


def _store(tx: Transaction, rollout: Rollout, executions: list[Execution], now: float) -> None:
    """Store what changed and tell those who watch."""
    if executions:
        tx.rollouts.put_executions(rollout.id, executions)
    for one in executions:
        _emit(
            tx,
            "execution.updated",
            rollout,
            now,
            device=one.device,
            state=one.state.value,
            reason=one.reason,
            detail=one.detail,
        )
    before = tx.rollouts.get(rollout.id)
    if before == rollout:
        return
    tx.rollouts.put(rollout)
    phases = [phase.state.value for phase in rollout.phases]
    _emit(tx, "rollout.updated", rollout, now, state=rollout.state.value, phases=phases, reason=rollout.reason)


def _emit(tx: Transaction, kind: str, rollout: Rollout, now: float, **data: object) -> None:
    data["release"] = str(rollout.spec.release)
    tx.journal.append_event(Event(kind=kind, subject=rollout.id, at=now, data=data))


def _active_of(tx: Transaction, model: ModelName) -> list[commands.Part]:
    active = [rollout for rollout in tx.rollouts.active() if rollout.spec.release.model == model]
    return [(rollout, tx.rollouts.executions(rollout.id)) for rollout in active]


def _devices(tx: Transaction, wanted: frozenset[DeviceId]) -> dict[DeviceId, Device]:
    known = tx.devices.all() if len(wanted) > SCAN_FROM_DEVICES else map(tx.devices.get, wanted)
    return {device.id: device for device in known if device is not None and device.id in wanted}


def _lineage(tx: Transaction, manifest: ReleaseManifest, devices: Iterable[Device]) -> Lineage:
    """What is known of the patches that could serve `devices`."""
    lineage = Lineage(bases=bases_of(manifest, _builds(tx, manifest.model)), codecs=CODECS)
    keys = {key for device in devices for key in wanted_patches(device, manifest, lineage)}
    known = {key: patch for key in keys if (patch := tx.patches.get(key.base, key.target, key.codec)) is not None}
    decided = {key: patch.state != "pending" for key, patch in known.items() if not patch.may_be_asked_again}
    return replace(lineage, decided=decided)


def _found(tx: Transaction, manifest: ReleaseManifest, devices: Iterable[Device]) -> dict[str, Findings]:
    """What has been found of the release's variants by the classes of those of the devices that are measured."""
    names = frozenset(manifest.variants)
    classes = {class_of(device) for device in devices if is_measured(device, names)}
    return findings_in(tx, manifest, classes) if classes else {}


def _elsewhere(tx: Transaction, rollout: Rollout) -> tuple[Execution, ...]:
    """What other active rollouts of the same release do."""
    others = [one for one in tx.rollouts.active() if one.spec.release == rollout.spec.release and one.id != rollout.id]
    return tuple(execution for one in others for execution in tx.rollouts.executions(one.id))


def _builds(tx: Transaction, model: ModelName) -> Iterator[Variant]:
    """The builds of all releases of a model."""
    after: tuple[str, str] | None = None
    while releases := tx.releases.page(after, RELEASES_PER_PAGE, model):
        for release in releases:
            yield from release.manifest.variants.values()
        after = _key(releases[-1].ref)


def _key(release: ReleaseRef) -> tuple[str, str]:
    return release.model, release.version
