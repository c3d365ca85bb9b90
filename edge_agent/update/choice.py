"""The cheapest way to an artifact: it is here already, a patch on something that is here, or the whole file."""

import msgspec

from common.ids import Digest
from common.wire import DesiredModel, PatchOffer


class FromHeld(msgspec.Struct, frozen=True, tag="held"):
    """The bytes are in a slot of this model."""


class FromPatch(msgspec.Struct, frozen=True, tag="patch"):
    """`offer.patch` on top of `offer.base`, which is in a slot of this model."""

    offer: PatchOffer


class FromFull(msgspec.Struct, frozen=True, tag="full"):
    """The whole artifact, from the controller."""


Source = FromHeld | FromPatch | FromFull


def choose(target: DesiredModel, held: frozenset[Digest], codecs: tuple[str, ...], *, patches: bool = True) -> Source:
    """How to get `target.artifact`, given the digests in the model's slots and the patch codecs of this build."""
    if target.artifact.digest in held:
        return FromHeld()
    usable = [
        offer
        for offer in target.patches
        if patches and offer.base in held and offer.codec in codecs and offer.patch.size < target.artifact.size
    ]
    if not usable:
        return FromFull()
    return FromPatch(min(usable, key=lambda offer: (offer.patch.size, offer.patch.digest)))
