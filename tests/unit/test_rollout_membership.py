"""Phases take the front of a hash order and only ever widen."""

import pytest

from common.errors import InvalidInput
from common.ids import DeviceId
from controller.rollouts.membership import check_widening, draw, position, reach, select
from controller.rollouts.model import PhaseSpec
from tests.unit.fleet import NOW, device

FLEET = [device(f"d{number}", labels={"site": "oslo" if number % 2 else "bergen"}) for number in range(10)]


def test_a_position_is_the_hash_of_salt_and_device_and_never_changes() -> None:
    # Written down: whoever has the salt can check afterwards who was drawn into which phase.
    assert position("salt", DeviceId("d1")) == pytest.approx(0.5424154734129575)


@pytest.mark.parametrize(
    ("phase", "total", "size"),
    [
        (PhaseSpec(percent=1), 10, 1),
        (PhaseSpec(percent=7), 100, 7),
        (PhaseSpec(percent=33), 10, 4),
        (PhaseSpec(percent=100), 10, 10),
        (PhaseSpec(count=3), 10, 3),
        (PhaseSpec(count=30), 10, 10),
    ],
)
def test_how_far_a_phase_reaches(phase: PhaseSpec, total: int, size: int) -> None:
    assert reach(phase, total) == size


def test_a_phase_by_selector_adds_those_that_match() -> None:
    phases = (PhaseSpec(selector='labels.site == "oslo"'), PhaseSpec(percent=100))
    placed = draw("s", FLEET, phases, NOW)
    assert {name for name, phase in placed.items() if phase == 0} == {"d1", "d3", "d5", "d7", "d9"}


def test_a_count_after_a_selector_fills_up() -> None:
    phases = (PhaseSpec(selector='id == "d3"'), PhaseSpec(count=4), PhaseSpec(percent=100))
    placed = draw("s", FLEET, phases, NOW)
    assert [list(placed.values()).count(phase) for phase in range(3)] == [1, 3, 6]


@pytest.mark.parametrize(
    ("phases", "field"),
    [
        ((), "phases"),
        ((PhaseSpec(percent=50), PhaseSpec(percent=20), PhaseSpec(percent=100)), "phases[1].percent"),
        ((PhaseSpec(percent=50), PhaseSpec(percent=50)), "phases[1].percent"),
        ((PhaseSpec(count=5), PhaseSpec(count=5), PhaseSpec(percent=100)), "phases[1].count"),
        ((PhaseSpec(percent=80), PhaseSpec(count=2), PhaseSpec(percent=100)), "phases[1].count"),
        ((PhaseSpec(percent=10, count=1), PhaseSpec(percent=100)), "phases[0]"),
        ((PhaseSpec(),), "phases[0]"),
    ],
)
def test_phases_that_do_not_widen_are_refused(phases: tuple[PhaseSpec, ...], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_widening(phases, 10)
    assert refused.value.field == field
    assert refused.value.fix


@pytest.mark.parametrize(
    ("phases", "field"),
    [
        ((PhaseSpec(percent=50),), "phases[0]"),
        ((PhaseSpec(count=2), PhaseSpec(count=9)), "phases[1]"),
        ((PhaseSpec(selector='id == "nobody"'), PhaseSpec(percent=100)), "phases[0].selector"),
        ((PhaseSpec(selector="id =="), PhaseSpec(percent=100)), "phases[0].selector"),
    ],
)
def test_phases_that_leave_devices_out_or_begin_with_none_are_refused(
    phases: tuple[PhaseSpec, ...], field: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        draw("s", FLEET, phases, NOW)
    assert refused.value.field == field


def test_a_selector_picks_by_facts() -> None:
    assert len(select('labels.site == "oslo" && presence == "online"', FLEET, NOW)) == 5
