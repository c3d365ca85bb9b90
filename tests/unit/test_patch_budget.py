"""Which patch comes first, which is skipped, which makes room."""

import math

import pytest
from msgspec.structs import replace

from common.artifact.digest import digest_of
from common.artifact.manifest import ArtifactRef
from common.ids import Digest
from controller.registry.patch_budget import (
    INDISPENSABLE,
    Budget,
    Demand,
    allowed_again,
    most_useful_first,
    no_room,
    room_for,
    skipped,
    why_not,
)
from controller.store.port import Patch

BUDGET = Budget(workers=1, cpu_s_per_release=100.0, build_cpu_s_max=10, disk_bytes_max=1000)


def file(name: str) -> Digest:
    return digest_of(name.encode())


def patch(base: str, target: str = "new", *, at: float = 0.0, size: int = 0) -> Patch:
    """Pending, or ready if it has a size."""
    row = Patch(base=file(base), target=file(target), codec="c.1", state="pending", created_at=at)
    made = ArtifactRef(file(f"{base} to {target}"), size)
    return replace(row, state="ready", patch=made) if size else row


def held(**devices: int) -> dict[Digest, int]:
    return {file(name): count for name, count in devices.items()}


def demand(**devices: int) -> Demand:
    return Demand(holders=held(**devices), current={file("new")})


def test_most_holders_come_first_then_those_that_waited_longest() -> None:
    rows = [patch("a", at=3), patch("b", at=1), patch("c", at=2), patch("d", at=0)]
    ordered = most_useful_first(rows, held(a=5, b=1, c=1))
    assert [row.base for row in ordered] == [file(name) for name in "abcd"]


@pytest.mark.parametrize(
    ("holders", "spent", "cause"),
    [(0, 0.0, "unheld"), (0, 100.0, "unheld"), (1, 0.0, None), (1, 99.9, None), (1, 100.0, "cpu"), (9, 150.0, "cpu")],
)
def test_a_patch_is_built_while_its_base_is_held_and_the_budget_lasts(
    holders: int, spent: float, cause: str | None
) -> None:
    skip = why_not(patch("a"), held(a=holders), spent, BUDGET)
    assert (skip.cause if skip else None) == cause


def test_what_fits_drives_nothing_out() -> None:
    stored = [patch("a", size=400), patch("b", size=500)]
    assert room_for(100, (0, 0), stored, demand(), 1000) == []


def test_room_is_made_by_the_unheld_then_the_outdated_then_those_with_fewest_holders_the_oldest_first() -> None:
    stored = [
        patch("a", size=100),
        patch("b", size=100, at=2),
        patch("c", "old", size=100, at=2),
        patch("c", "old2", size=100, at=1),
        patch("gone", size=100, at=9),
        patch("gone", "old", size=100, at=8),
    ]
    fleet = demand(a=1, b=3, c=50)
    victims = room_for(0, INDISPENSABLE, stored, fleet, 0)
    assert victims == [stored[5], stored[4], stored[3], stored[2], stored[0], stored[1]]
    assert room_for(150, INDISPENSABLE, stored, fleet, 600) == victims[:2]


@pytest.mark.parametrize(("holders", "fits"), [(1, False), (2, False), (3, True)])
def test_a_patch_only_takes_the_place_of_less_useful_ones(holders: int, fits: bool) -> None:
    fleet, stored = demand(a=2, new_base=holders), [patch("a", size=100)]
    room = room_for(100, fleet.rank(patch("new_base")), stored, fleet, 100)
    assert room == (stored if fits else None)


def test_nothing_goes_for_a_patch_that_would_not_fit_anyway() -> None:
    assert room_for(101, INDISPENSABLE, [patch("gone", size=50)], demand(), 100) is None


def test_what_was_skipped_says_why_and_how_much_room_it_needs() -> None:
    row = skipped(patch("a", size=70), no_room(70, 50))
    assert (row.state, row.patch, row.needs_bytes, row.skipped_for) == ("skipped", None, 70, "disk")
    assert "70 bytes" in row.reason and "50" in row.reason
    again = row.to_be_built()
    assert again == patch("a")


@pytest.mark.parametrize(
    ("row", "spent", "stored", "again"),
    [
        ("cpu", 99.0, 0, True),
        ("cpu", 100.0, 0, False),
        ("disk", 0.0, 930, True),
        ("disk", 0.0, 931, False),
        ("disk", 100.0, 0, False),
    ],
)
def test_a_budgets_verdict_holds_until_the_budget_allows_it(row: str, spent: float, stored: int, again: bool) -> None:
    verdict = replace(patch("a"), state="skipped", skipped_for=row, needs_bytes=70 if row == "disk" else 0)
    others = [patch("a", size=stored)] if stored else []
    found = allowed_again([verdict], demand(a=2), {file("new"): spent}, others, BUDGET)
    assert found == ([verdict] if again else [])


def test_what_nobody_could_use_any_more_is_not_built_again() -> None:
    rows = [replace(row, state="skipped", skipped_for="cpu") for row in (patch("gone"), patch("a", "old"))]
    assert allowed_again(rows, demand(a=2), {}, [], BUDGET) == []


def test_an_unlimited_budget_is_possible() -> None:
    assert why_not(patch("a"), held(a=1), 1e12, replace(BUDGET, cpu_s_per_release=math.inf)) is None
