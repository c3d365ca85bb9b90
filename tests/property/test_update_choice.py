"""The choice is the cheapest there is, found again by trying everything, and never more than the order allows."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from common.artifact import ArtifactRef, digest_of
from common.ids import Digest, ModelName, Version
from common.wire import DesiredFile, DesiredModel, PartsOffer, PatchOffer
from edge_agent.update.choice import (
    CHAIN_PATCHES_MAX,
    FromFull,
    FromHeld,
    FromParts,
    FromPatches,
    Local,
    Plan,
    Source,
    TooDear,
    choose,
    costliest,
    ranges_name,
)

NODES = [digest_of(f"file {number}".encode()) for number in range(6)]
CODECS = ("best.1", "plain.1")
KNOWN = ("plain.1",)
MANIFEST = ArtifactRef(digest_of(b"manifest"), 7)
SIZES = st.integers(0, 40)


def ref(name: str, size: int) -> ArtifactRef:
    return ArtifactRef(digest_of(name.encode()), size)


@st.composite
def patches(draw: st.DrawFn) -> tuple[PatchOffer, ...]:
    """Offers between any of the nodes, so chains, circles and dead ends."""
    pairs = draw(st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)), max_size=8))
    return tuple(
        PatchOffer(base, ArtifactRef(target, 100), ref(f"patch {number}", draw(SIZES)), draw(st.sampled_from(CODECS)))
        for number, (base, target) in enumerate(pairs)
    )


@st.composite
def files(draw: st.DrawFn) -> tuple[DesiredFile, ...]:
    wanted = draw(st.lists(st.sampled_from(NODES), min_size=1, max_size=3, unique=True))
    return tuple(
        DesiredFile(
            name=f"file{number}",
            artifact=ArtifactRef(digest, draw(st.integers(0, 100))),
            patches=draw(patches()),
            parts=tuple(
                PartsOffer(base, ref(f"index {base}", 5), ref(f"index {digest}", 5), draw(SIZES))
                for base in draw(st.lists(st.sampled_from(NODES), max_size=2, unique=True))
            ),
        )
        for number, digest in enumerate(wanted)
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[DesiredModel, Local]:
    target = DesiredModel(
        model=ModelName("kinds"),
        version=Version("1"),
        variant="default",
        manifest=MANIFEST,
        files=draw(files()),
        order=1,
        max_bytes=draw(st.none() | st.integers(0, 150)),
    )
    offers = [offer.patch.digest for file in target.files for offer in file.patches]
    offers += [offer.index.digest for file in target.files for offer in file.parts]
    ranges = [ranges_name(offer) for file in target.files for offer in file.parts]
    names = sorted({MANIFEST.digest, *(file.artifact.digest for file in target.files), *offers, *ranges})
    here = draw(st.dictionaries(st.sampled_from(names), st.integers(1, 60), max_size=4))
    local = Local(
        held=draw(st.frozensets(st.sampled_from([*NODES, MANIFEST.digest]), max_size=3)),
        codecs=KNOWN,
        here=here,
        spent=draw(st.integers(0, 50)),
        refused=draw(st.frozensets(st.sampled_from(offers), max_size=2)) if offers else frozenset(),
    )
    return target, local


def ways_to(file: DesiredFile) -> list[Source]:
    """Every way to the file that leads there, whether or not this device can go it."""
    chains = (chain for n in range(1, CHAIN_PATCHES_MAX + 1) for chain in itertools.permutations(file.patches, n))
    linked = (chain for chain in chains if all(a.target.digest == b.base for a, b in itertools.pairwise(chain)))
    return [
        FromHeld(),
        FromFull(),
        *(FromPatches(chain) for chain in linked if chain[-1].target.digest == file.artifact.digest),
        *map(FromParts, file.parts),
    ]


def works(file: DesiredFile, source: Source, local: Local) -> bool:
    match source:
        case FromHeld():
            return file.artifact.digest in local.held
        case FromPatches(offers):
            usable = all(o.codec in local.codecs and o.patch.digest not in local.refused for o in offers)
            return usable and offers[0].base in local.held
        case FromParts(offer):
            return offer.base in local.held and offer.index.digest not in local.refused
        case FromFull():
            return True


def cost(target: DesiredModel, way: tuple[Source, ...], local: Local) -> int:
    """Bytes still to come, by this test's own account."""
    sizes = {MANIFEST.digest: MANIFEST.size}
    for file, source in zip(target.files, way, strict=True):
        match source:
            case FromPatches(offers):
                sizes |= {offer.patch.digest: offer.patch.size for offer in offers}
            case FromParts(offer):
                sizes |= {offer.index.digest: offer.index.size, offer.base_index.digest: offer.base_index.size}
                sizes[ranges_name(offer)] = offer.bytes
            case FromFull():
                sizes[file.artifact.digest] = file.artifact.size
    return sum(max(0, size - local.here.get(name, 0)) for name, size in sizes.items() if name not in local.held)


def alone(target: DesiredModel, place: int) -> DesiredModel:
    """The order as if it named one of its files only."""
    return DesiredModel(
        model=target.model,
        version=target.version,
        variant=target.variant,
        manifest=target.manifest,
        files=(target.files[place],),
        order=1,
        max_bytes=target.max_bytes,
    )


@settings(max_examples=120, deadline=None)
@given(situations())
def test_for_each_file_no_way_is_cheaper_than_the_chosen_one(situation: tuple[DesiredModel, Local]) -> None:
    target, local = situation
    for place, file in enumerate(target.files):
        one = alone(target, place)
        cheapest = min(cost(one, (way,), local) for way in ways_to(file) if works(file, way, local))
        answer = choose(one, local)
        if isinstance(answer, Plan):
            assert answer.bytes == cheapest == cost(one, answer.sources, local)
            assert works(file, answer.sources[0], local)
        else:
            assert one.max_bytes is not None
            assert cheapest > 0
            assert answer == TooDear(local.spent + cheapest, one.max_bytes)


@settings(max_examples=120, deadline=None)
@given(situations())
def test_a_plan_works_says_what_it_costs_and_fits_the_budget(situation: tuple[DesiredModel, Local]) -> None:
    target, local = situation
    answer = choose(target, local)
    if isinstance(answer, TooDear):
        assert answer.budget == target.max_bytes
        assert answer.needs > answer.budget
        return
    assert all(works(file, way, local) for file, way in zip(target.files, answer.sources, strict=True))
    assert answer.bytes == cost(target, answer.sources, local)
    assert target.max_bytes is None or not answer.bytes or local.spent + answer.bytes <= target.max_bytes


def situation_of(*offers: PatchOffer, here: dict[Digest, int] | None = None) -> tuple[DesiredModel, Local]:
    file = DesiredFile(name="m", artifact=ArtifactRef(NODES[0], 100), patches=offers)
    target = DesiredModel(
        model=ModelName("kinds"), version=Version("1"), variant="d", manifest=MANIFEST, files=(file,), order=1
    )
    return target, Local(frozenset({NODES[1]}), KNOWN, here or {})


def patch(base: Digest, target: Digest, size: int, codec: str = KNOWN[0]) -> PatchOffer:
    return PatchOffer(base, ArtifactRef(target, 100), ref(f"{base} {target} {codec}", size), codec)


def test_a_chain_is_taken_where_it_is_cheaper_than_one_patch() -> None:
    direct, first, second = (
        patch(NODES[1], NODES[0], 30),
        patch(NODES[1], NODES[2], 10),
        patch(NODES[2], NODES[0], 10),
    )
    answer = choose(*situation_of(direct, second, first))
    assert answer == Plan((FromPatches((first, second)),), 20 + MANIFEST.size)
    assert isinstance(answer, Plan)
    assert costliest(answer.sources) == "delta"


def test_a_chain_has_no_more_patches_than_a_device_wants_to_apply() -> None:
    path = [NODES[1], NODES[2], NODES[3], NODES[4], NODES[0]]
    links = [patch(base, target, 1) for base, target in itertools.pairwise(path)]
    answer = choose(*situation_of(*links))
    assert isinstance(answer, Plan)
    assert answer.sources == (FromFull(),)


def test_a_codec_that_this_build_lacks_is_never_chosen() -> None:
    answer = choose(*situation_of(patch(NODES[1], NODES[0], 1, "best.1")))
    assert isinstance(answer, Plan)
    assert answer.sources == (FromFull(),)


def test_what_was_begun_is_gone_on_with_where_that_is_cheaper_now() -> None:
    offer = patch(NODES[1], NODES[0], 30)
    for so_far, chosen in ((60, FromPatches((offer,))), (80, FromFull())):
        answer = choose(*situation_of(offer, here={NODES[0]: so_far}))
        assert isinstance(answer, Plan)
        assert answer.sources == (chosen,)
