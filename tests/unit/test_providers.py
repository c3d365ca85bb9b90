"""The choice among execution providers, from what was measured."""

import pytest

from edge_agent.inference.providers import CPU, Rating, candidates, choose, turns

FAST, WRONG = "FastExecutionProvider", "WrongExecutionProvider"
SLOW_CPU = Rating(CPU, (0.010, 0.012, 0.300))


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [((0.005, 0.005, 0.500), FAST), ((0.0119, 0.0119, 0.0119), CPU), ((0.012, 0.012), CPU), ((0.02,), CPU)],
)
def test_another_provider_is_used_if_it_is_clearly_faster_most_of_the_time(
    seconds: tuple[float, ...], chosen: str
) -> None:
    assert choose([SLOW_CPU, Rating(FAST, seconds)]).provider == chosen


def test_a_provider_with_a_trouble_is_out_however_fast_it_is() -> None:
    choice = choose([SLOW_CPU, Rating(WRONG, (0.001,), "it answers otherwise"), Rating(FAST, (0.005,))])
    assert choice.provider == FAST
    assert choice.seen == {CPU: "0.012 s", WRONG: "it answers otherwise", FAST: "0.005 s"}


def test_only_what_is_allowed_and_there_is_tried_the_cpu_always_and_nothing_that_sends_inputs_away() -> None:
    available = [FAST, "AzureExecutionProvider", CPU]
    assert candidates([FAST, FAST, "AzureExecutionProvider", WRONG], available) == (CPU, FAST)
    assert candidates([], available) == (CPU,)


def test_everybody_is_first_in_some_round() -> None:
    assert {turns(("a", "b", "c"), number)[0] for number in range(7)} == {"a", "b", "c"}
    assert all(sorted(turns(("a", "b", "c"), number)) == ["a", "b", "c"] for number in range(7))
