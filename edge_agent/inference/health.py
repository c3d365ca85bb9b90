"""The verdict on a release that has just begun to serve: a pure judgement of counts.

An error is a request for which the release raised or gave a NaN or an infinity. Three verdicts: no data is never a pass
and never a fail. A few errors among many answers are tolerated (bad inputs exist), a run of errors is not, however many
answers came before it.

    >>> judge(Health(requests=20, errors=0, consecutive=0)).value
    'pass'
    >>> judge(Health(requests=4, errors=3, consecutive=2)).value
    'fail'
    >>> judge(Health(requests=2, errors=2, consecutive=2)).value
    'inconclusive'
"""

from enum import Enum

import msgspec


class Verdict(Enum):
    """What the counts say."""

    PASS = "pass"  # noqa: S105 (a verdict, not a password)
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


class Health(msgspec.Struct, frozen=True):
    """How a release has done since it began to serve.

    `requests` counts the answered and the failed ones, `errors` the failed ones among them, `consecutive` the errors
    since the last good answer.
    """

    requests: int = 0
    errors: int = 0
    consecutive: int = 0

    @property
    def healthy(self) -> int:
        """Requests that were answered well."""
        return self.requests - self.errors


class Limits(msgspec.Struct, frozen=True):
    """When counts become a verdict."""

    requests_min: int = 20
    """Good answers that a pass takes."""
    errors_min: int = 3
    """Fewer errors than this never fail a release by their share alone."""
    error_ratio_max: float = 0.05
    """The tolerated share of errors, 0 to 1."""
    consecutive_errors_max: int = 5
    """A run of this many errors fails the release."""


def judge(health: Health, limits: Limits = Limits()) -> Verdict:  # noqa: B008 (frozen: sharing the default is safe)
    """The verdict on `health`."""
    if health.consecutive >= limits.consecutive_errors_max:
        return Verdict.FAIL
    if health.errors >= limits.errors_min and health.errors > limits.error_ratio_max * health.requests:
        return Verdict.FAIL
    if health.healthy >= limits.requests_min:
        return Verdict.PASS
    return Verdict.INCONCLUSIVE
