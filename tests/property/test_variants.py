"""Variants by measurement: what holds for any findings, and what the words say in some.

For each promise there is a mutant that breaks it, so that the promise is known to be tested.
"""

import math
from collections.abc import Callable, Sequence
from statistics import median
from unittest.mock import patch

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from common.ids import DeviceId
from controller import variants
from controller.variants import EXPLORERS, GAIN_MIN, Decision, Finding, Findings, decide, settle

NAMES = ("default", "fp16", "int8", "tiny")
FLEET = tuple(DeviceId(f"d{number}") for number in range(6))
NEW = DeviceId("new")

findings = st.builds(
    lambda run_s, failed: (None if failed else run_s, failed),
    st.none() | st.sampled_from((0.05, 0.088, 0.09, 0.095, 0.1, 0.2)),
    st.booleans(),
)
tables = st.dictionaries(
    st.sampled_from(NAMES), st.dictionaries(st.sampled_from((*FLEET, NEW)), findings, max_size=5), max_size=4
).map(
    lambda rows: {
        name: tuple(Finding(device, run_s, failed) for device, (run_s, failed) in sorted(row.items()))
        for name, row in rows.items()
    }
)
releases = st.sets(st.sampled_from(NAMES), min_size=1).map(sorted)
tries = st.dictionaries(st.sampled_from(NAMES), st.frozensets(st.sampled_from(FLEET), max_size=3))


MAY_FAIL = settings(phases=(Phase.generate,), database=None)
"""For tests that catch mutants: to make such a failure small and to explain it may take minutes."""


def found(**seconds: tuple[float | None, ...]) -> Findings:
    """What as many devices found; `inf` is a failure."""
    return {
        name: tuple(
            Finding(FLEET[index], None if run_s == math.inf else run_s, run_s == math.inf)
            for index, run_s in enumerate(row)
        )
        for name, row in seconds.items()
    }


def seconds_of(row: Sequence[Finding]) -> list[float]:
    return [run_s for one in row if (run_s := math.inf if one.failed else one.run_s) is not None]


@given(tables, releases, tries, st.booleans())
def test_a_decision_is_a_variant_of_the_release_and_the_same_each_time(
    table: Findings, names: list[str], trying: dict[str, frozenset[DeviceId]], awaited: bool
) -> None:
    first = decide(table, names, NEW, trying=trying, awaited=awaited)
    again = decide(
        {name: table[name] for name in reversed(list(table))}, names[::-1], NEW, trying=trying, awaited=awaited
    )
    assert first == again
    assert first is None or first.variant in names


@MAY_FAIL
@given(tables, releases, tries)
def test_nobody_is_sent_to_try_what_enough_have_tried_or_one_has_failed_on(
    table: Findings, names: list[str], trying: dict[str, frozenset[DeviceId]]
) -> None:
    decision = decide(table, names, NEW, trying=trying, awaited=False)
    assert decision is not None
    if decision.exploring:
        row = table.get(decision.variant, ())
        assert not any(one.failed or one.device == NEW for one in row)
        assert len({one.device for one in row} | trying.get(decision.variant, frozenset())) < EXPLORERS


@given(tables, releases, tries)
def test_who_explores_takes_what_the_fewest_have_tried(
    table: Findings, names: list[str], trying: dict[str, frozenset[DeviceId]]
) -> None:
    decision = decide(table, names, NEW, trying=trying, awaited=True)
    if decision is None or not decision.exploring:
        return
    number = {
        name: len({one.device for one in table.get(name, ())} | trying.get(name, frozenset()))
        for name in names
        if not any(one.failed or one.device == NEW for one in table.get(name, ()))
    }
    assert number[decision.variant] == min(number.values())


@given(tables, releases)
def test_another_variant_than_the_usual_one_is_known_to_save_enough(table: Findings, names: list[str]) -> None:
    chosen = settle(table, names, NEW).variant
    failed = any(one.failed and one.device == NEW for one in table.get("default", ()))
    if "default" not in names or chosen == "default" or failed:
        return
    medians = {name: median(times) for name in names if (times := seconds_of(table.get(name, ())))}
    assert medians[chosen] <= (1 - GAIN_MIN) * medians["default"]
    mine = [name for name in names if Finding(NEW, None, True) in table.get(name, ())]
    assert medians[chosen] == min(run_s for name, run_s in medians.items() if name not in mine)


@given(tables, releases, st.sampled_from(NAMES))
def test_what_a_device_has_is_only_left_for_what_is_clearly_faster(
    table: Findings, names: list[str], before: str
) -> None:
    chosen = settle(table, names, NEW, before).variant
    times = seconds_of(table.get(before, ()))
    usable = before in names and times and math.isfinite(median(times))
    if usable and Finding(NEW, None, True) not in table.get(before, ()) and chosen != before:
        assert median(seconds_of(table[chosen])) <= (1 - GAIN_MIN) * median(times)


@MAY_FAIL
@given(tables, releases, st.integers(1, 20))
def test_a_class_comes_to_rest_and_each_variant_went_to_a_few(table: Findings, names: list[str], size: int) -> None:
    """Any number of devices in one batch: at most `EXPLORERS` new ones try a variant, evenly, and the rest wait."""
    trying: dict[str, set[DeviceId]] = {}
    waiting = 0
    for device in (DeviceId(f"n{number}") for number in range(size)):
        decision = decide(table, names, device, trying=trying, awaited=bool(trying))
        if decision is None:
            waiting += 1
        elif decision.exploring:
            assert not waiting, "one explores after another was told to wait"
            trying.setdefault(decision.variant, set()).add(device)
    assert all(len(devices) <= EXPLORERS for devices in trying.values())
    reports = {
        name: (*table.get(name, ()), *(Finding(one, 0.5) for one in trying.get(name, ()))) for name in {*table, *trying}
    }
    if waiting:
        assert decide(reports, names, DeviceId("last"), trying={}, awaited=False) is not None
        later = decide(reports, names, DeviceId("last"), trying={}, awaited=False)
        assert later is not None
        assert not later.exploring


@pytest.mark.parametrize(
    ("table", "variant", "because"),
    [
        (
            found(default=(0.0098, 0.0098), int8=(0.0041, 0.0041), fp16=(0.02, 0.01)),
            "int8",
            "fastest of 3 on this class: int8 4.1 ms (2 devices), default 9.8 ms (2 devices), fp16 15 ms (2 devices)",
        ),
        (
            found(default=(0.010, 0.010), int8=(0.0095, 0.0095)),
            "default",
            "nothing saves 10% of what default takes on this class: int8 9.5 ms (2 devices), default 10 ms (2 devices)",
        ),
        (found(default=(None, None), int8=(0.004,)), "default", "no device of this class has measured default"),
        (
            found(default=(math.inf,), int8=(0.004, 0.004)),
            "int8",
            "fastest of 2 on this class: int8 4 ms (2 devices), default failed on 1 of 1 device",
        ),
        (
            found(default=(0.01, 0.01), int8=(0.004, math.inf)),
            "default",
            "fastest of 2 on this class: default 10 ms (2 devices), int8 failed on 1 of 2 devices",
        ),
    ],
    ids=["fastest", "not enough", "unknown", "default failed", "half failed"],
)
def test_a_choice_says_why(table: Findings, variant: str, because: str) -> None:
    assert settle(table, ["default", "fp16", "int8"], NEW) == Decision(variant, False, because)


def test_a_release_without_a_default_gives_the_fastest() -> None:
    assert settle(found(fp16=(0.01,), int8=(0.02,)), ["fp16", "int8"], NEW).variant == "fp16"
    assert settle({}, ["fp16", "int8"], NEW).variant == "fp16"


def test_a_saving_that_is_too_small_moves_nobody() -> None:
    close = found(default=(0.010, 0.010), int8=(0.0095, 0.0095))
    assert settle(close, ["default", "int8"], NEW).variant == "default"
    assert settle(close, ["default", "int8"], NEW, before="int8").variant == "int8"
    assert settle({}, ["default", "int8"], NEW, before="int8").variant == "int8"


MUTANTS: dict[str, tuple[str, object, Callable[[], None]]] = {
    "explores without end": ("EXPLORERS", 99, test_nobody_is_sent_to_try_what_enough_have_tried_or_one_has_failed_on),
    "any gain will do": ("GAIN_MIN", 0.0, test_a_saving_that_is_too_small_moves_nobody),
    "leaves what it has": ("_base", lambda names, *_: names[0], test_a_saving_that_is_too_small_moves_nobody),
    "forgets who is trying": (
        "_tried_by",
        lambda findings, _: {one.device for one in findings},
        test_a_class_comes_to_rest_and_each_variant_went_to_a_few,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    attribute, wrong, promise = MUTANTS[name]
    with patch.object(variants, attribute, wrong), pytest.raises((AssertionError, BaseExceptionGroup)):
        promise()
