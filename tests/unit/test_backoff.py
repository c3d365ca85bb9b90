"""Full jitter: anywhere between nothing and the exponential cap."""

from hypothesis import given
from hypothesis import strategies as st

from common.backoff import Backoff


@given(attempt=st.integers(0, 10_000), uniform=st.floats(0, 1, exclude_max=True))
def test_a_wait_is_never_negative_and_never_over_the_cap(attempt: int, uniform: float) -> None:
    assert 0 <= Backoff(base_s=0.5, cap_s=60).delay_s(attempt, uniform) <= 60


def test_the_ceiling_doubles_until_the_cap() -> None:
    backoff = Backoff(base_s=1, cap_s=10)
    assert [backoff.delay_s(n, 1.0) for n in range(6)] == [1, 2, 4, 8, 10, 10]
