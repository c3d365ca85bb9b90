"""The ways to a file: what a device that holds some files can be offered instead of all bytes of another.

A patch leads from one file to another; a chain of patches leads over files that are only made on the way. Lists of
parts say which byte ranges a held file shares with the wanted one. What is offered is what an order carries
(`DesiredFile`): the direct patches, the cheapest chain where it beats them, and parts where they beat every patch. The
device chooses by what it really holds, and its byte budget is judged by the same sums (`update_bytes`).
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import lru_cache

import msgspec

from common.artifact.manifest import ArtifactRef
from common.artifact.parts import decode_index, missing_bytes
from common.ids import Digest
from common.wire import DesiredFile, PartsOffer, PatchOffer
from common.wire.messages import PARTS_PER_FILE_MAX

CHAIN_LENGTH_MAX = 3
"""Patches one after another: each costs a device a rebuilt file on its disk, and another chance to break."""
DIRECT_OFFERS_MAX = 4
"""Patches to the file itself, smallest first: a device holds two slots, and the whole order has a size limit."""
COMPARED_MAX = 64
"""Pairs of lists of parts whose comparison is remembered: the devices of a rollout mostly hold the same files."""


class PartsList(msgspec.Struct, frozen=True):
    """The parts of `file`: the artifact that lists them, and its bytes."""

    file: ArtifactRef
    index: ArtifactRef
    data: bytes


class Catalogue(msgspec.Struct, frozen=True):
    """What there is to offer: the patches that are ready, and lists of parts by file."""

    patches: tuple[PatchOffer, ...] = ()
    parts: Mapping[Digest, PartsList] = {}


def cheapest_chain(held: Set[Digest], target: Digest, patches: Iterable[PatchOffer]) -> tuple[PatchOffer, ...]:
    """The patches that lead from a held file to `target` with the fewest bytes, at most `CHAIN_LENGTH_MAX` of them.

    Of equally cheap chains a shorter one. Empty when there is none, or nothing to do.
    """
    ordered = sorted(patches, key=_by_size)
    best: dict[Digest, tuple[int, tuple[PatchOffer, ...]]] = dict.fromkeys(held, (0, ()))
    for _ in range(CHAIN_LENGTH_MAX):
        longer = dict(best)
        for patch in ordered:
            if patch.base not in best:
                continue
            cost, chain = best[patch.base][0] + patch.patch.size, (*best[patch.base][1], patch)
            known = longer.get(patch.target.digest)
            if known is None or cost < known[0]:  # equal ones that came in an earlier round are shorter
                longer[patch.target.digest] = (cost, chain)
        best = longer
    return best.get(target, (0, ()))[1]


def chain_bytes(chain: Iterable[PatchOffer]) -> int:
    """What the patches of a chain take together."""
    return sum(patch.patch.size for patch in chain)


def offered(
    name: str, file: ArtifactRef, held: Set[Digest], codecs: Sequence[str], catalogue: Catalogue
) -> DesiredFile:
    """The file as an order names it to a device that holds `held` and can apply patches of `codecs`.

    A device that has the file gets no offers: there is nothing to do.
    """
    if file.digest in held:
        return DesiredFile(name=name, artifact=file)
    patches = _patches(file, held, [patch for patch in catalogue.patches if patch.codec in codecs])
    plain = DesiredFile(name=name, artifact=file, patches=patches)
    return msgspec.structs.replace(plain, parts=_parts(file, held, least_bytes(plain, held), catalogue))


def least_bytes(file: DesiredFile, held: Set[Digest]) -> int:
    """The fewest bytes that bring the file to a device that holds `held`, by what is offered or whole."""
    if file.artifact.digest in held:
        return 0
    ways = [file.artifact.size, *(parts_bytes(offer) for offer in file.parts if offer.base in held)]
    if chain := cheapest_chain(held, file.artifact.digest, file.patches):
        ways.append(chain_bytes(chain))
    return min(ways)


def update_bytes(files: Iterable[DesiredFile], manifest: ArtifactRef, held: Set[Digest]) -> int:
    """The fewest bytes that bring a release to a device that holds `held`: what a byte budget is compared with."""
    return manifest.size + sum(least_bytes(file, held) for file in files)


def parts_bytes(offer: PartsOffer) -> int:
    """What taking parts costs, the two lists included."""
    return offer.bytes + offer.index.size + offer.base_index.size


def _patches(file: ArtifactRef, held: Set[Digest], usable: Sequence[PatchOffer]) -> tuple[PatchOffer, ...]:
    direct = sorted((one for one in usable if one.target.digest == file.digest and one.base in held), key=_by_size)
    chain = cheapest_chain(held, file.digest, usable)
    if len(chain) > 1 and chain_bytes(chain) < file.size:
        return (*direct[:DIRECT_OFFERS_MAX], *chain)
    return tuple(direct[:DIRECT_OFFERS_MAX])


def _parts(file: ArtifactRef, held: Set[Digest], cheaper_than: int, catalogue: Catalogue) -> tuple[PartsOffer, ...]:
    wanted = catalogue.parts.get(file.digest)
    if wanted is None:
        return ()
    offers = [
        PartsOffer(base, known.index, wanted.index, _missing(known, wanted))
        for base in sorted(held)
        if (known := catalogue.parts.get(base)) is not None
    ]
    worth = sorted((offer for offer in offers if parts_bytes(offer) < cheaper_than), key=parts_bytes)
    return tuple(worth[:PARTS_PER_FILE_MAX])


@lru_cache(maxsize=COMPARED_MAX)
def _missing(held: PartsList, wanted: PartsList) -> int:
    parts = [decode_index(one.data, one.file.size) for one in (held, wanted)]
    return missing_bytes(parts[:1], parts[1])


def _by_size(patch: PatchOffer) -> tuple[int, Digest, Digest, str]:
    return patch.patch.size, patch.base, patch.target.digest, patch.codec
