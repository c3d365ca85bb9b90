"""The ways to a file: what is offered is the cheapest there is, found by looking at all of them."""

from itertools import pairwise, permutations

from hypothesis import given
from hypothesis import strategies as st

from common.artifact import ArtifactRef, digest_of
from common.artifact.parts import Part, encode_index
from common.ids import Digest
from common.wire import DesiredFile, PatchOffer
from controller.rollouts.ways import (
    CHAIN_LENGTH_MAX,
    DIRECT_OFFERS_MAX,
    Catalogue,
    PartsList,
    chain_bytes,
    cheapest_chain,
    least_bytes,
    offered,
    parts_bytes,
    update_bytes,
)

SIZE = 1000
FILES = [ArtifactRef(digest_of(name.encode()), SIZE) for name in "abcdef"]
TARGET = FILES[-1]
CODECS = ("one", "two")

offers = st.builds(
    lambda base, target, size, codec: PatchOffer(
        base.digest, target, ArtifactRef(digest_of(f"{base}{target}{size}{codec}".encode()), size), codec
    ),
    st.sampled_from(FILES),
    st.sampled_from(FILES),
    st.integers(1, 900),
    st.sampled_from(CODECS),
)
patch_sets = st.lists(offers, max_size=10)
held_sets = st.sets(st.sampled_from(FILES[:-1]).map(lambda file: file.digest))
contents = st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), min_size=10, max_size=10)


def every_chain(held: set[Digest], patches: list[PatchOffer]) -> list[tuple[PatchOffer, ...]]:
    """All chains from a held file to the target, the slow way."""
    return [
        chain
        for length in range(1, CHAIN_LENGTH_MAX + 1)
        for chain in permutations(patches, length)
        if chain[0].base in held
        and chain[-1].target == TARGET
        and all(one.target.digest == two.base for one, two in pairwise(chain))
    ]


def parts_list(file: ArtifactRef, content: list[bytes]) -> PartsList:
    data = encode_index([Part(digest * 16, index * 100, 100) for index, digest in enumerate(content)])
    return PartsList(file, ArtifactRef(digest_of(data), len(data)), data)


@given(held=held_sets, patches=patch_sets)
def test_the_cheapest_chain_is_the_cheapest_of_all(held: set[Digest], patches: list[PatchOffer]) -> None:
    chain = cheapest_chain(held, TARGET.digest, patches)
    chains = every_chain(held, patches)
    assert bool(chain) == bool(chains)
    if chains:
        assert chain in chains
        assert (chain_bytes(chain), len(chain)) == min((chain_bytes(one), len(one)) for one in chains)


@given(held=held_sets, patches=patch_sets)
def test_a_chain_does_not_depend_on_the_order_in_which_patches_are_known(
    held: set[Digest], patches: list[PatchOffer]
) -> None:
    assert cheapest_chain(held, TARGET.digest, patches) == cheapest_chain(held, TARGET.digest, patches[::-1])


@given(
    held=held_sets,
    patches=patch_sets,
    codecs=st.sampled_from([(), CODECS[:1], CODECS]),
    lists=st.dictionaries(st.sampled_from(FILES), contents),
)
def test_what_is_offered_is_as_cheap_as_all_that_there_is(
    held: set[Digest], patches: list[PatchOffer], codecs: tuple[str, ...], lists: dict[ArtifactRef, list[bytes]]
) -> None:
    known = {file.digest: parts_list(file, content) for file, content in lists.items()}
    file = offered("f", TARGET, held, codecs, Catalogue(tuple(patches), known))
    spoken = [patch for patch in patches if patch.codec in codecs]
    costs = [SIZE, *(chain_bytes(chain) for chain in every_chain(held, spoken))]
    by_patch = min(costs)
    if TARGET in lists:
        for base in held & known.keys():
            shared = set(lists[next(one for one in lists if one.digest == base)])
            missing = 100 * sum(part not in shared for part in lists[TARGET])
            held_between = 100 * _held_between([part in shared for part in lists[TARGET]])
            costs.append(missing + held_between + known[base].index.size + known[TARGET.digest].index.size)
    assert least_bytes(file, held) == min(costs)
    assert {patch.codec for patch in file.patches} <= set(codecs)
    assert all(parts_bytes(offer) < by_patch for offer in file.parts)


def _held_between(held: list[bool]) -> int:
    """Held parts between two missing ones: with 100 bytes each, they are always fetched along."""
    missing = [place for place, is_held in enumerate(held) if not is_held]
    return sum(held[missing[0] : missing[-1]]) if missing else 0


@given(held=held_sets, patches=patch_sets)
def test_a_file_that_is_held_costs_nothing_and_gets_no_offers(held: set[Digest], patches: list[PatchOffer]) -> None:
    file = offered("f", TARGET, held | {TARGET.digest}, CODECS, Catalogue(tuple(patches)))
    assert file == DesiredFile(name="f", artifact=TARGET)
    assert update_bytes([file], ArtifactRef(TARGET.digest, 300), held | {TARGET.digest}) == 300


def line(*sizes: int) -> tuple[PatchOffer, ...]:
    """Patches one after another, from the first file to the target."""
    files = [*FILES[: len(sizes)], TARGET]
    return tuple(
        PatchOffer(files[place].digest, files[place + 1], ArtifactRef(digest_of(bytes([place])), size), "one")
        for place, size in enumerate(sizes)
    )


def test_a_chain_has_a_limit_of_patches() -> None:
    held = {FILES[0].digest}
    longest = line(*[10] * CHAIN_LENGTH_MAX)
    assert cheapest_chain(held, TARGET.digest, longest) == longest
    assert cheapest_chain(held, TARGET.digest, line(*[10] * (CHAIN_LENGTH_MAX + 1))) == ()


def test_of_equally_cheap_chains_the_shorter_one_is_taken() -> None:
    direct = PatchOffer(FILES[0].digest, TARGET, ArtifactRef(digest_of(b"direct"), 20), "two")
    assert cheapest_chain({FILES[0].digest}, TARGET.digest, (*line(10, 10), direct)) == (direct,)


def test_a_chain_that_costs_as_much_as_the_file_is_not_offered() -> None:
    for sizes, count in (((500, 499), 2), ((500, 500), 0)):
        file = offered("f", TARGET, {FILES[0].digest}, CODECS, Catalogue(line(*sizes)))
        assert len(file.patches) == count


def test_direct_patches_come_smallest_first_and_are_bounded() -> None:
    patches = [
        PatchOffer(FILES[place % 5].digest, TARGET, ArtifactRef(digest_of(bytes([place])), 900 - place), "one")
        for place in range(10)
    ]
    held = {file.digest for file in FILES[:-1]}
    file = offered("f", TARGET, held, CODECS, Catalogue(tuple(patches)))
    assert [offer.patch.size for offer in file.patches] == [891, 892, 893, 894][:DIRECT_OFFERS_MAX]
