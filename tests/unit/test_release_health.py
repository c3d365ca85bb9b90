"""When the counts of a new release are a pass, a fail, or not enough to say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.inference.health import Health, Limits, Verdict, judge

COUNTS = st.tuples(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 20)).map(
    lambda counts: Health(requests=counts[0] + counts[1], errors=counts[1], consecutive=min(counts[1], counts[2]))
)


@pytest.mark.parametrize(
    ("health", "verdict"),
    [
        (Health(), Verdict.INCONCLUSIVE),
        (Health(requests=19), Verdict.INCONCLUSIVE),
        (Health(requests=20), Verdict.PASS),
        (Health(requests=2, errors=2, consecutive=2), Verdict.INCONCLUSIVE),
        (Health(requests=3, errors=3, consecutive=3), Verdict.FAIL),
        (Health(requests=60, errors=3, consecutive=0), Verdict.PASS),  # exactly 5 % is tolerated
        (Health(requests=59, errors=3, consecutive=0), Verdict.FAIL),
        (Health(requests=30, errors=2, consecutive=1), Verdict.PASS),
        (Health(requests=21, errors=2, consecutive=0), Verdict.INCONCLUSIVE),
        (Health(requests=10_000, errors=5, consecutive=5), Verdict.FAIL),
    ],
)
def test_the_limits_are_where_they_are_said_to_be(health: Health, verdict: Verdict) -> None:
    assert judge(health) is verdict


@given(COUNTS)
def test_no_errors_never_fail_and_too_little_data_never_passes(health: Health) -> None:
    verdict = judge(health)
    assert verdict is not Verdict.FAIL or health.errors > 0
    assert verdict is not Verdict.PASS or health.healthy >= Limits().requests_min


@given(COUNTS, st.integers(1, 50))
def test_more_errors_never_turn_a_fail_into_something_better(health: Health, more: int) -> None:
    worse = Health(health.requests + more, health.errors + more, health.consecutive + more)
    assert judge(health) is not Verdict.FAIL or judge(worse) is Verdict.FAIL


@given(COUNTS)
def test_a_long_enough_run_of_good_answers_always_ends_in_a_pass(health: Health) -> None:
    later = Health(health.requests + 20 * health.errors + 20, health.errors, 0)
    assert judge(later) is Verdict.PASS


def test_limits_can_be_set() -> None:
    assert judge(Health(requests=1), Limits(requests_min=1)) is Verdict.PASS
    assert judge(Health(requests=1, errors=1, consecutive=1), Limits(consecutive_errors_max=1)) is Verdict.FAIL
