"""The cheapest way to a release's files, in bytes over the network, and whether it fits the order's byte budget.

Each file is got in one of four ways: it is in a slot already; a chain of patches, the first on something that is in a
slot; its parts that changed, the others copied; or whole. Offers form a graph (base to target), the chain is the path
in it with the fewest bytes. What a download has left on the disk is spent already and costs nothing more, so after a
break the way that was begun is usually the cheapest still. Files are chosen for one by one: their costs add up.

A budget is the most that may cross the network for this update in all. Over it nothing is chosen: no way is taken
because it is the last one left.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import msgspec

from common.artifact import ArtifactRef, digest_of
from common.ids import Digest
from common.wire import DesiredFile, DesiredModel, PartsOffer, PatchOffer, Strategy

CHAIN_PATCHES_MAX = 3
"""Patches applied one after another for one file; each writes a whole file on the way."""

STRATEGIES: tuple[Strategy, ...] = ("none", "delta", "incremental", "full")
"""From the cheapest to the costliest; the costliest of its files' names an update."""


class FromHeld(msgspec.Struct, frozen=True, tag="held"):
    """The bytes are in a slot of this model."""

    strategy: ClassVar[Strategy] = "none"


class FromPatches(msgspec.Struct, frozen=True, tag="patches"):
    """`offers` applied one after another; the first one's base is in a slot of this model."""

    offers: tuple[PatchOffer, ...]

    strategy: ClassVar[Strategy] = "delta"


class FromParts(msgspec.Struct, frozen=True, tag="parts"):
    """The parts that `offer.base`, which is in a slot, has not, as ranges of the file; the rest is copied from it."""

    offer: PartsOffer

    strategy: ClassVar[Strategy] = "incremental"


class FromFull(msgspec.Struct, frozen=True, tag="full"):
    """The whole file, from the controller."""

    strategy: ClassVar[Strategy] = "full"


Source = FromHeld | FromPatches | FromParts | FromFull
Sources = tuple[Source, ...]
"""One for each of `DesiredModel.files`, in their order."""


class Local(NamedTuple):
    """What the device brings to the choice.

    `held` is at hand for nothing (files in slots, the manifest if a slot has it), `here` how many bytes of each
    download are on the disk, `spent` what this update has moved so far, those included, `codecs` the kinds of patches
    that this build applies, `refused` the patches and indexes that have turned out to be of no use.
    """

    held: frozenset[Digest]
    codecs: tuple[str, ...]
    here: Mapping[Digest, int] = {}
    spent: int = 0
    refused: frozenset[Digest] = frozenset()


class Plan(NamedTuple):
    """The cheapest way: `bytes` are still to come for it, the manifest's included."""

    sources: Sources
    bytes: int


class TooDear(NamedTuple):
    """Even the cheapest way would make the update cost `needs` bytes in all, and the order allows `budget`."""

    needs: int
    budget: int


def choose(target: DesiredModel, local: Local) -> Plan | TooDear:
    """How to get all of `target.files` for the fewest bytes."""
    sources = tuple(_cheapest(file, local) for file in target.files)
    missing = sum(_missing(name, size, local) for name, size in downloads(target, sources).items())
    if target.max_bytes is not None and missing and local.spent + missing > target.max_bytes:
        return TooDear(local.spent + missing, target.max_bytes)
    return Plan(sources, missing)


def downloads(target: DesiredModel, sources: Sources) -> dict[Digest, int]:
    """What is downloaded that way, each once: its name and its size in bytes."""
    needed = {target.manifest.digest: target.manifest.size}
    for file, source in zip(target.files, sources, strict=True):
        needed |= _downloads(file, source)
    return needed


def possible_downloads(target: DesiredModel) -> dict[Digest, int]:
    """Everything that an update to `target` may download, whatever way it takes."""
    needed = {target.manifest.digest: target.manifest.size}
    for file in target.files:
        ways: tuple[Source, ...] = (FromFull(), FromPatches(file.patches), *map(FromParts, file.parts))
        for way in ways:
            needed |= _downloads(file, way)
    return needed


def offered(target: DesiredModel) -> frozenset[Digest]:
    """The names under which `target`'s offers are refused."""
    patches = {offer.patch.digest for file in target.files for offer in file.patches}
    return frozenset(patches | {offer.index.digest for file in target.files for offer in file.parts})


def ranges_name(offer: PartsOffer) -> Digest:
    """The name under which the ranges that `offer` leaves to be fetched are downloaded, one after another."""
    return digest_of(f"{offer.index.digest} without {offer.base_index.digest}".encode())


def costliest(sources: Iterable[Source]) -> Strategy:
    """The strategy that names an update of these files."""
    return max((source.strategy for source in sources), key=STRATEGIES.index, default="none")


def _cheapest(file: DesiredFile, local: Local) -> Source:
    """The fewest bytes; where that leaves a choice, the least work."""
    if file.artifact.digest in local.held:
        return FromHeld()
    chain = _shortest_chain(file, local)
    ways: list[Source] = [FromFull()]
    ways += [FromPatches(chain)] if chain else []
    ways += [FromParts(offer) for offer in file.parts if _is_usable(offer, local)]
    return min(
        ways, key=lambda way: sum(_missing(name, size, local) for name, size in _downloads(file, way).items())
    )  # the first of equals


def _shortest_chain(file: DesiredFile, local: Local) -> tuple[PatchOffer, ...]:
    """The path with the fewest bytes from anything held to the file, empty if there is none.

    Bellman-Ford, one round for each patch that a chain may have (Cormen et al., Introduction to Algorithms, 24.1).
    """
    usable = [o for o in file.patches if o.codec in local.codecs and o.patch.digest not in local.refused]
    best: dict[Digest, tuple[PatchOffer, ...]] = dict.fromkeys(local.held, ())

    def cost(chain: tuple[PatchOffer, ...]) -> tuple[int, int, list[Digest]]:
        names = [offer.patch.digest for offer in chain]
        return sum(_missing(offer.patch.digest, offer.patch.size, local) for offer in chain), len(chain), names

    for _ in range(CHAIN_PATCHES_MAX):
        further = dict(best)
        for offer in usable:
            if (base := best.get(offer.base)) is not None:
                known, way = further.get(offer.target.digest), (*base, offer)
                if known is None or cost(way) < cost(known):
                    further[offer.target.digest] = way
        best = further
    return best.get(file.artifact.digest, ())


def _is_usable(offer: PartsOffer, local: Local) -> bool:
    return offer.base in local.held and offer.index.digest not in local.refused


def _downloads(file: DesiredFile, source: Source) -> dict[Digest, int]:
    refs: tuple[ArtifactRef, ...] = ()
    match source:
        case FromPatches(offers):
            refs = tuple(offer.patch for offer in offers)
        case FromParts(offer):
            return {
                offer.index.digest: offer.index.size,
                offer.base_index.digest: offer.base_index.size,
                ranges_name(offer): offer.bytes,
            }
        case FromFull():
            refs = (file.artifact,)
        case FromHeld():
            pass
    return {ref.digest: ref.size for ref in refs}


def _missing(name: Digest, size: int, local: Local) -> int:
    return 0 if name in local.held else max(0, size - local.here.get(name, 0))
