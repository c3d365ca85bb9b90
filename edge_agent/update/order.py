"""Which orders are accepted, and whether an order and a manifest speak of the same bytes.

An attacker may replay an old order, send one meant for another device, or pair a good order with another release's
manifest. So: the signature first, then the device, then the generation, and later the manifest against the order.
"""

import msgspec

from common.artifact import Variant, decode_manifest
from common.artifact.manifest import PAYLOAD_TYPE
from common.errors import Conflict, Forbidden, IntegrityFailure
from common.ids import DeviceId
from common.trust import PublicKey, is_newer, verify
from common.wire import DesiredModel, DesiredState, decode
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from edge_agent.update.state import MANIFEST_FILE, files_of


def open_order(envelope: bytes, keys: tuple[PublicKey, ...], device: DeviceId, highest: int) -> DesiredState:
    """The order in `envelope`, if this device must follow it.

    `highest` is the highest generation accepted so far. Raises `IntegrityFailure` (signature, form), `Forbidden`
    (meant for another device), `Conflict` (an older order: replayed, or the controller was restored from a backup).
    """
    try:
        desired = decode(verify(envelope, DESIRED_PAYLOAD_TYPE, keys), DesiredState)
    except msgspec.ValidationError as error:
        raise IntegrityFailure(f"not an order: {error}") from error
    if desired.device != device:
        raise Forbidden(f"the order is for {desired.device}, this is {device}", field="device")
    if not is_newer(desired.generation, highest):
        fix = "publish an order with a higher generation; an authorised rollback is a newer order"
        raise Conflict(f"generation {desired.generation} is not above {highest}", field="generation", fix=fix)
    names = [model.model for model in desired.models]
    if len(set(names)) != len(names):
        raise IntegrityFailure("the order names a model twice", field="models")
    return desired


def agreed_variant(envelope: bytes, keys: tuple[PublicKey, ...], target: DesiredModel) -> Variant:
    """The variant that the signed manifest in `envelope` and the signed order `target` agree on.

    Raises `IntegrityFailure` when the manifest is not signed by a trusted key or speaks of another release or bytes.
    """
    manifest = decode_manifest(verify(envelope, PAYLOAD_TYPE, keys))
    if (manifest.model, manifest.version) != (target.model, target.version):
        raise IntegrityFailure(f"the manifest is of {manifest.release}, the order asks for {target.version}")
    variant = manifest.variants.get(target.variant)
    if variant is None:
        raise IntegrityFailure(f"{manifest.release} has no variant {target.variant!r}")
    files = files_of(target)
    if len({name.casefold() for name in files} | {MANIFEST_FILE}) != len(target.files) + 1:
        raise IntegrityFailure(f"the files of {manifest.release} cannot lie in one folder: {', '.join(files)}")
    if (variant.files, variant.model) != (files, target.files[0].name):
        raise IntegrityFailure(f"order and manifest of {manifest.release} name different bytes")
    return variant
