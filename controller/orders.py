"""Making orders: the signed desired state of a device.

An order is complete: it names every model that the device should run, so the newest one alone is enough. It is made in
the transaction that changes what the device is assigned, and signed there, so that there is never an assignment without
its order. `DesiredModel.order` is the generation in which that model's part last changed; it is carried from order to
order (the last order is stored exactly as it was sent), so that news about one model does not disturb another. So are
the terms on which a model is taken. The ways to its files that are cheaper than all bytes are looked up anew each time.
"""

from collections.abc import Iterable, Set

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of
from common.errors import IntegrityFailure, TooLarge
from common.ids import DeviceId, Digest, ModelName, ReleaseRef
from common.trust import Signer, unverified_payload
from common.wire import DesiredFile, DesiredModel, DesiredState, OnExceed, PatchOffer, Shadow, Split, encode
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from controller.devices import Device, choose_variant, is_measured, next_generation, reported_model
from controller.rollouts.ways import CHAIN_LENGTH_MAX, Catalogue, PartsList, offered, update_bytes
from controller.store.port import Order, Release, Transaction

CHAIN_TARGETS_MAX = 64
"""Files that are looked at as places on the way to the wanted ones, nearest first."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How a device takes a release: see the fields of the same names of `DesiredModel`. The defaults are for a model
    that no rollout says otherwise of.
    """

    probation_s: float = 30.0
    max_bytes: int | None = None
    on_exceed: OnExceed = "defer"
    shadow: Shadow | None = None
    split: Split | None = None
    variant: str | None = None
    """What was chosen for a device that leaves it to measurement."""
    measure: bool = False


PLAIN_TERMS = Terms()


class Ways:
    """The ways to files for the devices of one unit of work. Most are alike, and looked up for only once."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self._catalogues: dict[object, Catalogue] = {}
        self._offers: dict[object, tuple[DesiredFile, ...]] = {}

    def to(self, files: tuple[tuple[str, ArtifactRef], ...], device: Device) -> tuple[DesiredFile, ...]:
        """The files, by name, as `device` is ordered to have them."""
        held, codecs = _held(device), _codecs(device)
        offers = self._offers.get((files, held, codecs))
        if offers is None:
            catalogue = self._catalogue(tuple(file for _, file in files if file.digest not in held), held)
            offers = tuple(offered(name, file, held, codecs, catalogue) for name, file in files)
            self._offers[files, held, codecs] = offers
        return offers

    def _catalogue(self, missing: tuple[ArtifactRef, ...], held: frozenset[Digest]) -> Catalogue:
        if not missing or not held:
            return Catalogue()
        if (missing, held) not in self._catalogues:
            self._catalogues[missing, held] = load_catalogue(self._tx, missing, held)
        return self._catalogues[missing, held]


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
    terms: Terms = PLAIN_TERMS,
    traceparent: str | None = None,
    ways: Ways | None = None,
) -> Device:
    """Store `device` (its `assigned` is what it should run) with a new, signed, unpublished order for it.

    `changed` is the model that this order is about; it is taken on `terms`, and is new even if its version is
    the one of the last order (a retry lifts the quarantine). `ways` is for who makes several orders. The device as it
    is stored.
    """
    device = replace(device, generation=next_generation(device))
    ways = ways or Ways(tx)
    desired = desired_state(tx, device, ways, now=now, changed=changed, terms=terms, traceparent=traceparent)
    envelope = signer.sign(DESIRED_PAYLOAD_TYPE, _encoded(desired, changed))
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
    ways: Ways,
    *,
    now: float,
    changed: ModelName | None = None,
    terms: Terms = PLAIN_TERMS,
    traceparent: str | None = None,
) -> DesiredState:
    """All that `device` should run, from what it is assigned, as its generation says."""
    last = {model.model: model for model in _last_models(tx, device.id)}
    models = []
    for name, version in sorted(device.assigned.items()):
        release = tx.releases.get(ReleaseRef(name, version))
        if release is None:
            raise IntegrityFailure(f"{device.id} is assigned {name}@{version}, which is not in the store")
        before = last.get(name)
        order, agreed = device.generation, terms
        if name != changed and before is not None and before.version == version:
            order, agreed = before.order, _terms_of(before)
        models.append(_desired_model(ways, device, release, order, agreed))
    return DesiredState(
        device=device.id, generation=device.generation, issued_at=now, models=tuple(models), traceparent=traceparent
    )


def decode_order(order: Order) -> DesiredState:
    """What an order of our own says (its signature is not checked: it came from the store)."""
    return msgspec.json.decode(unverified_payload(order.envelope), type=DesiredState)


def _last_models(tx: Transaction, device: DeviceId) -> tuple[DesiredModel, ...]:
    order = tx.orders.get(device)
    return () if order is None else decode_order(order).models


def improvable(tx: Transaction, devices: Iterable[Device], model: ModelName) -> frozenset[DeviceId]:
    """Those of the devices that wait for a cheaper way to their order's version of `model`, and for which there is one.

    Waiting is what they say themselves; what they could do is judged by their order and what they hold.
    """
    ways = Ways(tx)
    waiting = [device for device in devices if _waits(device, model)]
    found = set()
    for device in waiting:
        wanted = next((one for one in _last_models(tx, device.id) if one.model == model), None)
        if wanted is None or wanted.max_bytes is None:
            continue
        held = _held(device)
        now = ways.to(tuple((file.name, file.artifact) for file in wanted.files), device)
        if update_bytes(now, wanted.manifest, held) < update_bytes(wanted.files, wanted.manifest, held):
            found.add(device.id)
    return frozenset(found)


def load_catalogue(tx: Transaction, files: Iterable[ArtifactRef], held: Set[Digest]) -> Catalogue:
    """What can be offered to devices that want `files` and hold some of `held`, chains and lists of parts included."""
    wanted = {file.digest: file for file in files}
    patches: list[PatchOffer] = []
    seen: set[Digest] = set()
    reached = sorted(wanted)
    for _ in range(CHAIN_LENGTH_MAX):
        targets = [digest for digest in reached if digest not in seen][: CHAIN_TARGETS_MAX - len(seen)]
        seen.update(targets)
        some = [patch for target in targets for patch in _ready_patches(tx, wanted.get(target), target)]
        patches += some
        reached = sorted({patch.base for patch in some})
    parts = {digest: one for digest in {*wanted, *held} if (one := _parts_list(tx, digest)) is not None}
    return Catalogue(tuple(patches), parts)


def _ready_patches(tx: Transaction, target: ArtifactRef | None, digest: Digest) -> list[PatchOffer]:
    target = target or tx.artifacts.get(digest)
    if target is None:
        return []
    ready = [known for known in tx.patches.for_target(digest) if known.state == "ready"]
    return [PatchOffer(known.base, target, known.patch, known.codec) for known in ready if known.patch is not None]


def _parts_list(tx: Transaction, digest: Digest) -> PartsList | None:
    known, file = tx.parts.get(digest), tx.artifacts.get(digest)
    return None if known is None or file is None else PartsList(file, known.index, known.data)


def _waits(device: Device, model: ModelName) -> bool:
    """Whether the device says that it cannot go on fetching what it should run."""
    entry = reported_model(device, model)
    if entry is None or entry.phase != "fetching" or not entry.detail:
        return False
    return entry.target == device.assigned.get(model)


def _desired_model(ways: Ways, device: Device, release: Release, order: int, terms: Terms) -> DesiredModel:
    name = _variant(device, release.manifest, terms.variant)
    return DesiredModel(
        model=release.ref.model,
        version=release.ref.version,
        variant=name,
        manifest=release.envelope,
        files=ways.to(_files(release.manifest.variants[name]), device),
        order=order,
        probation_s=terms.probation_s,
        max_bytes=terms.max_bytes,
        on_exceed=terms.on_exceed,
        shadow=terms.shadow or UNSET,
        split=terms.split or UNSET,
        measure=terms.measure or UNSET,
    )


def _files(variant: Variant) -> tuple[tuple[str, ArtifactRef], ...]:
    """The files of a variant, the ONNX file first."""
    names = (variant.model, *sorted(variant.files.keys() - {variant.model}))
    return tuple((name, variant.files[name]) for name in names)


def _terms_of(model: DesiredModel) -> Terms:
    return Terms(
        probation_s=model.probation_s,
        max_bytes=model.max_bytes,
        on_exceed=model.on_exceed,
        shadow=model.shadow or None,
        split=model.split or None,
        variant=model.variant,
        measure=bool(model.measure),
    )


def _variant(device: Device, manifest: ReleaseManifest, chosen: str | None) -> str:
    """The variant for the device. One that ran here before may fit it no more; then it says so itself when it tries.

    One that measurement decides about is as it was `chosen` when its model was ordered, until it is ordered anew.
    """
    available = frozenset(manifest.variants)
    if chosen in available and is_measured(device, available):
        return chosen
    return choose_variant(device, available) or min(available)


def _held(device: Device) -> frozenset[Digest]:
    return frozenset(device.reported.held if device.reported else ())


def _codecs(device: Device) -> tuple[str, ...]:
    return device.capabilities.patch_codecs if device.capabilities else ()


def _encoded(desired: DesiredState, changed: ModelName | None) -> bytes:
    """The order within its size limit: a device with very many files under way is offered less, first of the others."""
    for kept in (None, {changed}, set[ModelName | None]()):
        models = [model if kept is None or model.model in kept else _without_offers(model) for model in desired.models]
        try:
            return encode(replace(desired, models=tuple(models)))
        except TooLarge as error:
            too_large = error
    raise too_large


def _without_offers(model: DesiredModel) -> DesiredModel:
    return replace(model, files=tuple(replace(file, patches=(), parts=()) for file in model.files))
