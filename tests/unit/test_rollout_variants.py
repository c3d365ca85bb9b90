"""Variants by measurement around the decision: who takes part, what orders carry, what reports leave behind."""

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.trust import Signer
from common.wire import Capabilities, DesiredModel, Outcome, UpdateReport
from controller.devices import Device, choose_variant, is_measured
from controller.intake import apply_reported
from controller.measurements import findings_in, variants_in
from controller.operations import commit, load_snapshot, preview_rollout
from controller.orders import Terms, decode_order, make_order
from controller.rollouts.model import Execution, ExecutionState, PhaseState, RolloutState
from controller.rollouts.observation import observed
from controller.rollouts.patching import Lineage, bases_of, wanted_patches
from controller.rollouts.planner import Notify, Revert, plan
from controller.store.port import FoundVariant, Release
from controller.variants import Chosen, Finding
from tests.simulation.memory import MemoryTransaction
from tests.unit.fleet import CODEC, MODEL, NOW, V1, V2, a_spec, device, rollout, saying, told

SIGNER = Signer.generate()
OTHER = ModelName("other")
KIND = "old board"
NAMES = ("default", "fp16", "int8")
ALL = frozenset(NAMES)
AUTO = Capabilities(agent_version="1", patch_codecs=(CODEC,), variants=("auto",), device_class=KIND)
CHOSEN = Chosen(version=V1, variant="int8", device_class=KIND, because="fastest")


def file(version: Version, variant: str) -> ArtifactRef:
    return ArtifactRef(digest_of(f"{version} {variant}".encode()), 1000)


def builds(version: Version, model: ModelName = MODEL) -> ReleaseManifest:
    return ReleaseManifest(
        model, version, {name: Variant({"model.onnx": file(version, name)}, "model.onnx", (), ()) for name in NAMES}
    )


@pytest.fixture
def tx() -> MemoryTransaction:
    """Two releases of one model and one of another, in three variants each."""
    transaction = MemoryTransaction()
    for model, version in ((MODEL, V1), (MODEL, V2), (OTHER, V1)):
        ref = ReleaseRef(model, version)
        envelope = ArtifactRef(digest_of(str(ref).encode()), 300)
        transaction.releases.rows[ref] = Release(
            ref=ref, manifest=builds(version, model), envelope=envelope, published_at=0, published_by="test"
        )
    return transaction


def auto(name: str = "d0", *variants: str, **changes: object) -> Device:
    """A device that leaves its variant to measurement, or that prefers `variants`."""
    capabilities = replace(AUTO, variants=variants) if variants else AUTO
    return device(name, **{"capabilities": capabilities, **changes})


def ordered(tx: MemoryTransaction, model: ModelName = MODEL, name: str = "d0") -> DesiredModel:
    (found,) = [one for one in decode_order(tx.orders.rows[DeviceId(name)]).models if one.model == model]
    return found


@pytest.mark.parametrize(
    ("variants", "measured"),
    [
        (("auto",), True),
        (("int4", "auto"), True),
        (("int8", "auto"), False),
        (("default",), False),
        (("default", "auto"), False),
    ],
)
def test_measurement_decides_where_nothing_the_owner_prefers_to_it_is_there(
    variants: tuple[str, ...], measured: bool
) -> None:
    assert is_measured(auto("d0", *variants), ALL) is measured


def test_a_device_without_a_class_or_a_choice_takes_what_is_usual() -> None:
    unknown = device(capabilities=replace(AUTO, device_class=UNSET))
    assert not is_measured(unknown, ALL)
    assert choose_variant(unknown, ALL) == "default"
    assert choose_variant(unknown, frozenset({"fp16", "int8"})) == "fp16"
    assert not is_measured(auto(), frozenset({"int8"}))
    assert choose_variant(auto(), frozenset({"int8"})) == "int8"


def test_what_is_built_in_advance_is_for_every_variant_that_a_device_may_get() -> None:
    manifest = builds(V2)
    lineage = Lineage(bases=bases_of(manifest, builds(V1).variants.values()), codecs=(CODEC,))
    holder = saying(auto(), held=(file(V1, "default").digest,))

    assert {key.target for key in wanted_patches(holder, manifest, lineage)} == {file(V2, name).digest for name in ALL}
    assert [key.target for key in wanted_patches(holder, manifest, lineage, "fp16")] == [file(V2, "fp16").digest]


def test_an_order_keeps_the_variant_until_its_model_is_ordered_anew(tx: MemoryTransaction) -> None:
    terms = Terms(variant="int8", measure=True)
    known = make_order(tx.view, auto(), SIGNER, now=NOW, changed=MODEL, terms=terms)
    assert (ordered(tx).variant, ordered(tx).measure, ordered(tx).artifact) == ("int8", True, file(V1, "int8"))

    both = replace(known, assigned={MODEL: V1, OTHER: V1})
    known = make_order(tx.view, both, SIGNER, now=NOW, changed=OTHER, terms=Terms(variant="fp16", measure=True))
    assert (ordered(tx).variant, ordered(tx).measure) == ("int8", True)
    assert ordered(tx, OTHER).variant == "fp16"

    make_order(tx.view, known, SIGNER, now=NOW, changed=MODEL, terms=Terms(variant="default"))
    assert (ordered(tx).variant, ordered(tx).measure) == ("default", UNSET)
    assert ordered(tx, OTHER).variant == "fp16"


def test_an_owner_who_names_variants_again_is_heeded_at_the_next_order(tx: MemoryTransaction) -> None:
    known = make_order(tx.view, auto(), SIGNER, now=NOW, changed=MODEL, terms=Terms(variant="int8"))
    named = replace(known, capabilities=replace(AUTO, variants=("fp16",)))
    make_order(tx.view, replace(named, assigned={MODEL: V1, OTHER: V1}), SIGNER, now=NOW, changed=OTHER)
    assert ordered(tx).variant == "fp16"


def test_telling_records_the_choice_and_taking_back_gives_back_the_variant_of_before(tx: MemoryTransaction) -> None:
    tx.devices.put(auto(chosen={MODEL: CHOSEN}))
    begun = rollout(PhaseState.DEPLOYING)
    tx.rollouts.put(begun)
    tx.rollouts.put_executions(begun.id, [Execution(device=DeviceId("d0"), phase=0)])

    (notify,) = plan(load_snapshot(tx.view, begun, 0.0), NOW)
    assert isinstance(notify, Notify)
    commit(tx.view, begun, [notify], signer=SIGNER, now=NOW, traceparent=None)

    (execution,) = tx.rollouts.executions(begun.id)
    assert execution.previous_chosen == CHOSEN
    assert execution.chosen == tx.devices.rows[DeviceId("d0")].chosen[MODEL]
    assert execution.chosen is not None
    assert (execution.chosen.version, execution.chosen.variant, execution.chosen.exploring) == (V2, "default", True)
    assert (ordered(tx).version, ordered(tx).variant, ordered(tx).measure) == (V2, "default", True)

    going_back = replace(begun, state=RolloutState.ROLLING_BACK)
    tx.rollouts.put_executions(begun.id, [replace(execution, state=ExecutionState.SUCCEEDED)])
    (revert,) = plan(load_snapshot(tx.view, going_back, 0.0), NOW)
    assert isinstance(revert, Revert)
    commit(tx.view, going_back, [revert], signer=SIGNER, now=NOW, traceparent=None)

    assert (ordered(tx).version, ordered(tx).variant, ordered(tx).measure) == (V1, "int8", UNSET)
    assert tx.devices.rows[DeviceId("d0")].chosen == {MODEL: CHOSEN}


def test_taking_back_a_rollout_that_changed_variants_only_gives_back_the_variants(tx: MemoryTransaction) -> None:
    before = replace(CHOSEN, version=V2)
    going_back = rollout(PhaseState.DEPLOYING, state=RolloutState.ROLLING_BACK)
    for name, variant in (("d0", "fp16"), ("d1", before.variant)):
        chosen = replace(before, variant=variant)
        tx.devices.put(auto(name, assigned={MODEL: V2}, chosen={MODEL: chosen}))
        part = told(name, ExecutionState.SUCCEEDED, previous=V2, previous_chosen=before, chosen=chosen)
        tx.rollouts.put_executions(going_back.id, [part])

    (revert,) = plan(load_snapshot(tx.view, going_back, 0.0), NOW)
    commit(tx.view, going_back, [revert], signer=SIGNER, now=NOW, traceparent=None)

    assert (ordered(tx).version, ordered(tx).variant) == (V2, "int8")
    assert DeviceId("d1") not in tx.orders.rows


def test_devices_of_one_batch_try_different_variants_and_the_rest_wait(tx: MemoryTransaction) -> None:
    for number in range(8):
        tx.devices.put(auto(f"d{number}", connected=number != 0))
    begun = rollout(PhaseState.DEPLOYING)
    tx.rollouts.put_executions(begun.id, [Execution(device=DeviceId(f"d{number}"), phase=0) for number in range(8)])

    actions = plan(load_snapshot(tx.view, begun, 0.0), NOW)

    told_now = [one.execution for one in actions if isinstance(one, Notify)]
    tries = {one.device: one.chosen.variant for one in told_now if one.chosen}
    assert tries == dict(zip((f"d{number}" for number in range(1, 7)), NAMES * 2, strict=True))
    commit(tx.view, begun, actions, signer=SIGNER, now=NOW, traceparent=None)
    assert plan(load_snapshot(tx.view, begun, 0.0), NOW) == []
    late = plan(load_snapshot(tx.view, begun, 0.0), NOW + a_spec().patience_s + 1)
    assert [one.execution.device for one in late if isinstance(one, Notify)] == ["d0", "d7"]


def test_a_device_that_failed_on_the_fastest_gets_another_in_the_same_batch(tx: MemoryTransaction) -> None:
    seconds = {"default": (0.01, 0.01), "fp16": (0.02, 0.02), "int8": (0.004, 0.004, 0.004, None)}
    for variant, row in seconds.items():
        for number, run_s in enumerate(row):
            found = FoundVariant(
                artifact=file(V2, variant).digest,
                device_class=KIND,
                device=DeviceId(f"d{number + 2}"),
                release=ReleaseRef(MODEL, V2),
                at=NOW,
                run_s=run_s,
                failed=run_s is None,
            )
            tx.findings.put(found)
    begun = rollout(PhaseState.DEPLOYING)
    for name in ("d1", "d5", "d7"):
        tx.devices.put(auto(name))
    tx.rollouts.put_executions(begun.id, [Execution(device=DeviceId(name), phase=0) for name in ("d1", "d5", "d7")])

    actions = plan(load_snapshot(tx.view, begun, 0.0), NOW)

    told_now = [one.execution for one in actions if isinstance(one, Notify)]
    assert [one.chosen and one.chosen.variant for one in told_now] == ["int8", "default", "int8"]


def test_a_preview_counts_the_variant_that_is_known_to_be_the_fastest(tx: MemoryTransaction) -> None:
    tx.devices.put(saying(auto(), held=(file(V2, "int8").digest,)))
    assert preview_rollout(tx.view, a_spec(), salt="s", now=NOW).phases[0].full == 1
    for number, (variant, run_s) in enumerate((("default", 0.01), ("int8", 0.004))):
        found = FoundVariant(
            artifact=file(V2, variant).digest,
            device_class=KIND,
            device=DeviceId(f"x{number}"),
            release=ReleaseRef(MODEL, V2),
            at=NOW,
            run_s=run_s,
        )
        tx.findings.put(found)
    assert preview_rollout(tx.view, a_spec(), salt="s", now=NOW).phases[0].unchanged == 1


def test_those_who_try_a_variant_in_another_rollout_of_the_release_count(tx: MemoryTransaction) -> None:
    one, other = rollout(PhaseState.DEPLOYING), replace(rollout(PhaseState.DEPLOYING), id="r2")
    tx.devices.put(auto("d9"))
    trying = [
        told(f"d{number}", chosen=replace(CHOSEN, version=V2, variant=name, exploring=True))
        for number, name in enumerate(("default", "default", "fp16", "fp16", "int8"))
    ]
    for begun, parts in ((one, [Execution(device=DeviceId("d9"), phase=0)]), (other, trying)):
        tx.rollouts.put(begun)
        tx.rollouts.put_executions(begun.id, parts)

    (notify,) = plan(load_snapshot(tx.view, one, 0.0), NOW)

    assert isinstance(notify, Notify)
    assert notify.execution.chosen is not None
    assert notify.execution.chosen.because == "to be measured: 1 of 2 devices of this class have tried int8"


def test_another_variant_of_the_running_version_is_not_there_before_the_device_has_begun() -> None:
    part = told(chosen=replace(CHOSEN, version=V2))
    waiting = saying(auto(), running=V2, generation=2)
    assert waiting.reported is not None
    before = replace(waiting.reported.models[0], generation=1)
    waiting = replace(waiting, reported=replace(waiting.reported, models=(before,)))

    assert observed(part, waiting, ReleaseRef(MODEL, V2), NOW).state is ExecutionState.NOTIFIED
    done = saying(auto(), running=V2, generation=2, outcome="succeeded")
    assert observed(part, done, ReleaseRef(MODEL, V2), NOW).state is ExecutionState.SUCCEEDED


def report(tx: MemoryTransaction, outcome: Outcome, seq: int, changes: dict[str, object]) -> None:
    update = UpdateReport(generation=2, version=V2, outcome=outcome, variant="int8", run_s=0.004, finished_at=seq)
    words = saying(auto(), generation=2).reported
    assert words is not None
    entry = replace(words.models[0], last_update=replace(update, **changes))
    apply_reported(tx.view, DeviceId("d0"), replace(words, seq=seq, models=(entry,)), NOW + seq)


def test_a_finished_update_leaves_what_the_device_found_of_its_variant(tx: MemoryTransaction) -> None:
    tx.devices.put(auto())
    report(tx, "succeeded", 1, {})
    assert tx.findings.of(file(V2, "int8").digest) == [
        FoundVariant(
            artifact=file(V2, "int8").digest,
            device_class=KIND,
            device=DeviceId("d0"),
            release=ReleaseRef(MODEL, V2),
            at=NOW + 1,
            run_s=0.004,
        )
    ]
    report(tx, "failed", 2, {"run_s": UNSET})
    (found,) = tx.findings.of(file(V2, "int8").digest)
    assert (found.failed, found.run_s, found.at) == (True, None, NOW + 2)


@pytest.mark.parametrize("changes", [{"variant": UNSET}, {"variant": "int4"}, {"version": Version("9")}])
def test_what_says_nothing_of_a_variant_leaves_nothing(tx: MemoryTransaction, changes: dict[str, object]) -> None:
    tx.devices.put(auto())
    report(tx, "succeeded", 1, changes)
    assert tx.findings.rows == {}


def test_a_failure_counts_in_its_own_release_and_a_time_in_every_one_with_the_file(tx: MemoryTransaction) -> None:
    shared = file(V2, "int8").digest
    for number, failed in enumerate((False, True)):
        tx.findings.put(
            FoundVariant(
                artifact=shared,
                device_class=KIND,
                device=DeviceId(f"d{number}"),
                release=ReleaseRef(MODEL, V1),
                at=NOW,
                run_s=None if failed else 0.004,
                failed=failed,
            )
        )
    assert findings_in(tx.view, builds(V2)) == {KIND: {"int8": [Finding(DeviceId("d0"), 0.004)]}}
    assert findings_in(tx.view, builds(V2), {"new board"}) == {"new board": {}}
    (view,) = variants_in(tx.view, tx.releases.rows[ReleaseRef(MODEL, V2)])
    assert (view.device_class, view.variant, view.devices, view.failed, view.run_s) == (KIND, "int8", 1, 0, 0.004)
