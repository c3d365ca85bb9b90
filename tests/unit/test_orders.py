"""Orders: complete, signed, and quiet about models that did not change."""

import pytest
from msgspec.structs import replace

from common.artifact import ArtifactRef, digest_of
from common.errors import Conflict, IntegrityFailure
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.trust import Signer, verify
from common.wire import DesiredState, decode
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from controller.devices import Device
from controller.operations import commit
from controller.orders import decode_order, first_order, make_order
from controller.rollouts.planner import Notify
from controller.store.port import Patch, PatchState, Release
from tests.simulation.memory import MemoryTransaction
from tests.unit.fleet import CODEC, MODEL, NOW, V1, V2, artifact, device, manifest, rollout, saying, told

SIGNER = Signer.generate()
OTHER = ModelName("other")


@pytest.fixture
def tx() -> MemoryTransaction:
    """Two releases of one model and one of another."""
    transaction = MemoryTransaction()
    for model, version in ((MODEL, V1), (MODEL, V2), (OTHER, V1)):
        ref = ReleaseRef(model, version)
        envelope = ArtifactRef(digest_of(str(ref).encode()), 300)
        contents = replace(manifest(version), model=model)
        transaction.releases.rows[ref] = Release(
            ref=ref, manifest=contents, envelope=envelope, published_at=0, published_by="test"
        )
    return transaction


def ordered(tx: MemoryTransaction) -> DesiredState:
    return decode_order(tx.orders.rows[DeviceId("d0")])


def orders_of(tx: MemoryTransaction) -> dict[str, tuple[str, int, float]]:
    return {model.model: (model.version, model.order, model.probation_s) for model in ordered(tx).models}


def test_a_device_that_joins_is_ordered_to_run_nothing(tx: MemoryTransaction) -> None:
    stored = first_order(tx.view, Device(id=DeviceId("d0"), created_at=0), SIGNER, NOW)
    assert (stored.generation, ordered(tx).generation, ordered(tx).models) == (1, 1, ())


def test_an_order_is_signed_and_named_by_its_bytes(tx: MemoryTransaction) -> None:
    make_order(tx.view, device(), SIGNER, now=NOW, traceparent="00-aa-bb-01")
    order = tx.orders.rows[DeviceId("d0")]
    payload = verify(order.envelope, DESIRED_PAYLOAD_TYPE, (SIGNER.public_key,))
    assert decode(payload, DesiredState) == decode_order(order)
    assert order.etag == digest_of(order.envelope)
    assert not order.published
    assert ordered(tx).traceparent == "00-aa-bb-01"


def test_news_about_one_model_leaves_the_order_of_another_as_it_was(tx: MemoryTransaction) -> None:
    known = make_order(tx.view, device(assigned={OTHER: V1}), SIGNER, now=NOW, changed=OTHER, probation_s=5)
    known = replace(known, assigned={OTHER: V1, MODEL: V1})
    known = make_order(tx.view, known, SIGNER, now=NOW, changed=MODEL, probation_s=7)
    assert orders_of(tx) == {OTHER: ("1", 2, 5.0), MODEL: ("1", 3, 7.0)}


def test_a_version_that_changed_is_a_new_order_of_its_model(tx: MemoryTransaction) -> None:
    known = make_order(tx.view, device(assigned={MODEL: V1}), SIGNER, now=NOW)
    make_order(tx.view, replace(known, assigned={MODEL: V2}), SIGNER, now=NOW)
    assert orders_of(tx)[MODEL][:2] == ("2", 3)


def test_the_same_version_ordered_again_is_a_new_order(tx: MemoryTransaction) -> None:
    known = make_order(tx.view, device(assigned={MODEL: V1}), SIGNER, now=NOW)
    make_order(tx.view, known, SIGNER, now=NOW, changed=MODEL)
    assert orders_of(tx)[MODEL][:2] == ("1", 3)


def test_only_ready_patches_from_what_the_device_holds_are_offered(tx: MemoryTransaction) -> None:
    held = artifact(V1).digest, digest_of(b"pending"), digest_of(b"small")
    states: tuple[PatchState, ...] = ("ready", "pending", "ready")
    for base, state, size in zip(held, states, (50, 1, 20), strict=True):
        patch = ArtifactRef(digest_of(b"patch" + base.encode()), size) if state == "ready" else None
        target = artifact(V2).digest
        tx.patches.put(Patch(base=base, target=target, codec=CODEC, state=state, created_at=0, patch=patch))
    known = saying(device(assigned={MODEL: V2}), held=(*held, digest_of(b"unknown")))
    make_order(tx.view, known, SIGNER, now=NOW)
    assert [offer.patch.size for offer in ordered(tx).models[0].patches] == [20, 50]


def test_a_device_without_a_fitting_variant_finds_out_itself(tx: MemoryTransaction) -> None:
    ref = ReleaseRef(MODEL, V2)
    tx.releases.rows[ref] = replace(tx.releases.rows[ref], manifest=manifest(variants=["int8"]))
    make_order(tx.view, device(assigned={MODEL: V2}), SIGNER, now=NOW)
    assert ordered(tx).models[0].variant == "int8"


def test_a_release_that_was_never_published_cannot_be_ordered(tx: MemoryTransaction) -> None:
    with pytest.raises(IntegrityFailure, match="not in the store"):
        make_order(tx.view, device(assigned={MODEL: Version("9")}), SIGNER, now=NOW)


def test_a_plan_made_before_another_order_is_not_committed(tx: MemoryTransaction) -> None:
    tx.devices.put(device(generation=5))
    stale = Notify(execution=told(generation=3), version=V2)
    with pytest.raises(Conflict, match="another order"):
        commit(tx.view, rollout(), [stale], signer=SIGNER, now=NOW, traceparent=None)


def test_an_order_is_newer_than_any_that_the_device_has_accepted_also_after_a_restore(tx: MemoryTransaction) -> None:
    ahead = saying(replace(device("d0"), generation=3), generation=41)
    assert make_order(tx.view, ahead, SIGNER, now=NOW).generation == 42
    assert ordered(tx).generation == 42
