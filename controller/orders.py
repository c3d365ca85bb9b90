"""Making orders: the signed desired state of a device.

An order is complete: it names every model that the device should run, so the newest one alone is enough. It is made in
the transaction that changes what the device is assigned, and signed there, so that there is never an assignment without
its order. `DesiredModel.order` is the generation in which that model's part last changed; it is carried from order to
order (the last order is stored exactly as it was sent), so that news about one model does not disturb another.
"""

import msgspec
from msgspec.structs import replace

from common.artifact import ReleaseManifest, digest_of
from common.errors import IntegrityFailure
from common.ids import DeviceId, Digest, ModelName, ReleaseRef
from common.trust import Signer, unverified_payload
from common.wire import DesiredModel, DesiredState, PatchOffer, encode
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from controller.devices import Device, choose_variant, next_generation
from controller.store.port import Order, Release, Transaction

PATCH_OFFERS_MAX = 4
"""Patches offered per model, smallest first: a device holds two slots, and the whole order has a size limit."""
PROBATION_S = 30.0
"""For a model that no rollout says otherwise of."""


def first_order(tx: Transaction, device: Device, signer: Signer, now: float) -> Device:
    """Store a device that joins, with its first order: generation 1, nothing to run. The device as it is stored."""
    return make_order(tx, device, signer, now=now)


def make_order(
    tx: Transaction,
    device: Device,
    signer: Signer,
    *,
    now: float,
    changed: ModelName | None = None,
    probation_s: float = PROBATION_S,
    traceparent: str | None = None,
) -> Device:
    """Store `device` (its `assigned` is what it should run) with a new, signed, unpublished order for it.

    `changed` is the model that this order is about; it is tried with `probation_s`, and is new even if its version is
    the one of the last order (a retry lifts the quarantine). The device as it is stored.
    """
    device = replace(device, generation=next_generation(device))
    desired = desired_state(tx, device, now=now, changed=changed, probation_s=probation_s, traceparent=traceparent)
    envelope = signer.sign(DESIRED_PAYLOAD_TYPE, encode(desired))
    tx.orders.put(
        Order(
            device=device.id,
            generation=device.generation,
            etag=digest_of(envelope),
            envelope=envelope,
            created_at=now,
        )
    )
    tx.devices.put(device)
    return device


def desired_state(
    tx: Transaction,
    device: Device,
    *,
    now: float,
    changed: ModelName | None = None,
    probation_s: float = PROBATION_S,
    traceparent: str | None = None,
) -> DesiredState:
    """All that `device` should run, from what it is assigned, as its generation says."""
    last = {model.model: model for model in _last_models(tx, device.id)}
    models = []
    for name, version in sorted(device.assigned.items()):
        release = tx.releases.get(ReleaseRef(name, version))
        if release is None:
            raise IntegrityFailure(f"{device.id} is assigned {name}@{version}, which is not in the store")
        model = _desired_model(tx, device, release, device.generation, probation_s)
        before = last.get(name)
        if name != changed and before is not None and before.version == version:
            model = replace(model, order=before.order, probation_s=before.probation_s)
        models.append(model)
    return DesiredState(
        device=device.id, generation=device.generation, issued_at=now, models=tuple(models), traceparent=traceparent
    )


def decode_order(order: Order) -> DesiredState:
    """What an order of our own says (its signature is not checked: it came from the store)."""
    return msgspec.json.decode(unverified_payload(order.envelope), type=DesiredState)


def _last_models(tx: Transaction, device: DeviceId) -> tuple[DesiredModel, ...]:
    order = tx.orders.get(device)
    return () if order is None else decode_order(order).models


def _desired_model(tx: Transaction, device: Device, release: Release, order: int, probation_s: float) -> DesiredModel:
    variant = _variant(device, release.manifest)
    artifact = release.manifest.variants[variant].artifact
    return DesiredModel(
        model=release.ref.model,
        version=release.ref.version,
        variant=variant,
        manifest=release.envelope,
        artifact=artifact,
        patches=_offers(tx, device, artifact.digest),
        order=order,
        probation_s=probation_s,
    )


def _variant(device: Device, manifest: ReleaseManifest) -> str:
    """The variant for the device. One that ran here before may fit it no more; then it says so itself when it tries."""
    available = frozenset(manifest.variants)
    return choose_variant(device, available) or min(available)


def _offers(tx: Transaction, device: Device, target: Digest) -> tuple[PatchOffer, ...]:
    if device.reported is None or device.capabilities is None:
        return ()
    offers = [
        PatchOffer(base, known.patch, codec)
        for base in device.reported.held
        for codec in device.capabilities.patch_codecs
        if (known := tx.patches.get(base, target, codec)) is not None
        and known.state == "ready"
        and known.patch is not None
    ]
    offers.sort(key=lambda offer: (offer.patch.size, offer.base))
    return tuple(offers[:PATCH_OFFERS_MAX])
