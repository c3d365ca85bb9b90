"""Orders: complete, signed, and quiet about models that did not change."""

import pytest
from msgspec.structs import replace

from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of
from common.artifact.manifest import FILES_PER_VARIANT_MAX
from common.artifact.parts import Part, encode_index
from common.errors import Conflict, IntegrityFailure
from common.ids import DeviceId, ModelName, ReleaseRef, Version
from common.trust import Signer, verify
from common.wire import DesiredState, Shadow, Split, decode
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from controller.devices import Device
from controller.operations import commit
from controller.orders import Terms, decode_order, first_order, improvable, make_order
from controller.rollouts.planner import Notify, Renew
from controller.store.port import FileParts, Patch, PatchState, Release
from tests.simulation.memory import MemoryTransaction
from tests.unit.fleet import CODEC, MODEL, NOW, SIZE, V1, V2, artifact, device, manifest, rollout, saying, told

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
    known = make_order(
        tx.view, device(assigned={OTHER: V1}), SIGNER, now=NOW, changed=OTHER, terms=Terms(probation_s=5)
    )
    known = replace(known, assigned={OTHER: V1, MODEL: V1})
    known = make_order(tx.view, known, SIGNER, now=NOW, changed=MODEL, terms=Terms(probation_s=7))
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
    assert [offer.patch.size for offer in ordered(tx).models[0].files[0].patches] == [20, 50]


def test_terms_are_carried_until_the_model_is_ordered_anew(tx: MemoryTransaction) -> None:
    terms = Terms(probation_s=5, max_bytes=777, on_exceed="fail")
    known = make_order(tx.view, device(assigned={MODEL: V1}), SIGNER, now=NOW, changed=MODEL, terms=terms)
    known = make_order(tx.view, known, SIGNER, now=NOW)
    (model,) = ordered(tx).models
    assert (model.order, model.probation_s, model.max_bytes, model.on_exceed) == (2, 5, 777, "fail")
    make_order(tx.view, known, SIGNER, now=NOW, changed=MODEL)
    assert ordered(tx).models[0].max_bytes is None


def test_what_an_order_says_about_requests_is_carried_too(tx: MemoryTransaction) -> None:
    terms = Terms(shadow=Shadow(for_s=5, agreement_min=0.9), split=Split(share=0.1, header="x-side"))
    known = make_order(tx.view, device(assigned={MODEL: V1}), SIGNER, now=NOW, changed=MODEL, terms=terms)
    known = make_order(tx.view, known, SIGNER, now=NOW)
    (model,) = ordered(tx).models
    assert (model.shadow, model.split) == (terms.shadow, terms.split)
    make_order(tx.view, known, SIGNER, now=NOW, changed=MODEL)
    assert not ordered(tx).models[0].shadow
    assert not ordered(tx).models[0].split


def publish(tx: MemoryTransaction, version: Version, *names: str, model: str = "model.onnx") -> dict[str, ArtifactRef]:
    """A release of MODEL made of files of these names."""
    files = {name: ArtifactRef(digest_of(f"{name} {version}".encode()), SIZE) for name in names}
    ref = ReleaseRef(MODEL, version)
    contents = ReleaseManifest(MODEL, version, {"default": Variant(files, model, (), ())})
    tx.releases.rows[ref] = replace(tx.releases.rows[ref], manifest=contents)
    tx.artifacts.rows.update({file.digest: file for file in files.values()})
    return files


def put_patch(tx: MemoryTransaction, base: ArtifactRef, target: ArtifactRef, size: int) -> None:
    patch = ArtifactRef(digest_of(base.digest.encode() + target.digest.encode()), size)
    tx.patches.put(Patch(base=base.digest, target=target.digest, codec=CODEC, state="ready", created_at=0, patch=patch))


def put_parts(tx: MemoryTransaction, file: ArtifactRef, *digests: bytes) -> None:
    size = file.size // len(digests)
    data = encode_index([Part(digest * 16, index * size, size) for index, digest in enumerate(digests)])
    index = ArtifactRef(digest_of(data), len(data))
    tx.parts.rows[file.digest] = FileParts(file=file.digest, index=index, data=data)


def test_every_file_is_ordered_with_its_own_patches_the_onnx_file_first(tx: MemoryTransaction) -> None:
    old = publish(tx, V1, "z.onnx", "a.data", model="z.onnx")
    new = publish(tx, V2, "z.onnx", "a.data", model="z.onnx")
    put_patch(tx, old["a.data"], new["a.data"], 9)
    held = tuple(file.digest for file in (old["z.onnx"], old["a.data"], new["z.onnx"]))
    make_order(tx.view, saying(device(assigned={MODEL: V2}), held=held), SIGNER, now=NOW)
    model, data = ordered(tx).models[0].files
    assert (model.name, model.artifact, model.patches) == ("z.onnx", new["z.onnx"], ())
    assert (data.name, [offer.patch.size for offer in data.patches]) == ("a.data", [9])


def test_a_chain_over_a_release_that_the_device_never_had_is_offered(tx: MemoryTransaction) -> None:
    old, middle, new = artifact(V1), ArtifactRef(digest_of(b"middle"), 1234), artifact(V2)
    tx.artifacts.rows[middle.digest] = middle
    put_patch(tx, old, middle, 10)
    put_patch(tx, middle, new, 20)
    make_order(tx.view, saying(device(assigned={MODEL: V2}), held=(old.digest,)), SIGNER, now=NOW)
    offers = ordered(tx).models[0].files[0].patches
    assert [(offer.base, offer.target) for offer in offers] == [(old.digest, middle), (middle.digest, new)]


def test_parts_are_offered_where_they_are_cheaper_than_every_patch(tx: MemoryTransaction) -> None:
    old, new = (publish(tx, version, "model.onnx")["model.onnx"] for version in (V1, V2))
    put_parts(tx, old, b"a", b"b")
    put_parts(tx, new, b"a", b"c")
    known = saying(device(assigned={MODEL: V2}), held=(old.digest,))
    make_order(tx.view, known, SIGNER, now=NOW)
    (offer,) = ordered(tx).models[0].files[0].parts
    assert (offer.base, offer.bytes) == (old.digest, SIZE // 2)
    assert (offer.base_index, offer.index) == tuple(tx.parts.rows[file.digest].index for file in (old, new))
    put_patch(tx, old, new, 100)
    make_order(tx.view, replace(known, generation=2), SIGNER, now=NOW)
    assert ordered(tx).models[0].files[0].parts == ()


def test_a_device_that_waits_is_improvable_once_there_is_a_cheaper_way(tx: MemoryTransaction) -> None:
    old, new = artifact(V1), artifact(V2)
    waits = saying(device(assigned={MODEL: V2}), phase="fetching", target=V2, held=(old.digest,), detail="too dear")
    waits = make_order(tx.view, waits, SIGNER, now=NOW, changed=MODEL, terms=Terms(max_bytes=100))
    assert improvable(tx.view, [waits], MODEL) == frozenset()
    put_patch(tx, old, new, 300)
    assert improvable(tx.view, [waits], MODEL) == {waits.id}
    idle = saying(waits, running=V1, held=(old.digest,))
    at_work = saying(waits, phase="fetching", target=V2, held=(old.digest,))
    assert improvable(tx.view, [idle, at_work], MODEL) == frozenset()
    commit(tx.view, rollout(), [Renew(device=waits.id)], signer=SIGNER, now=NOW, traceparent=None)
    (model,) = ordered(tx).models
    assert (ordered(tx).generation, model.order, model.max_bytes) == (3, 2, 100)
    assert [offer.patch.size for offer in model.files[0].patches] == [300]
    assert improvable(tx.view, [waits], MODEL) == frozenset(), "it was told"


def test_an_order_that_would_be_too_large_offers_less_and_first_of_what_it_is_not_about(tx: MemoryTransaction) -> None:
    names = [f"f{number}.data" for number in range(FILES_PER_VARIANT_MAX - 1)]
    models = [ModelName(f"m{number}") for number in range(20)]
    bases = [ArtifactRef(digest_of(f"base {number}".encode()), SIZE) for number in range(8)]
    for model in models:
        files = {name: ArtifactRef(digest_of(f"{name} {model}".encode()), SIZE) for name in ("m.onnx", *names)}
        manifest_of = ReleaseManifest(model, V1, {"default": Variant(files, "m.onnx", (), ())})
        ref = ReleaseRef(model, V1)
        tx.releases.rows[ref] = replace(tx.releases.rows[ReleaseRef(MODEL, V1)], ref=ref, manifest=manifest_of)
        for file in files.values():
            for base in bases:
                put_patch(tx, base, file, 10)
    known = saying(device(assigned=dict.fromkeys(models, V1)), held=tuple(base.digest for base in bases))
    make_order(tx.view, known, SIGNER, now=NOW, changed=models[3])
    offering = [model.model for model in ordered(tx).models if model.files[0].patches]
    assert offering == [models[3]]


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
