"""How far two releases agree on the requests that both had: one comparison, and the sum of many. Pure.

Only what the live release answered well is a sample. A request on which both fail is the input's fault and says
nothing; one on which the candidate alone fails is a sample that does not agree.
"""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from common.artifact.answers import differs
from common.artifact.selftest import Close, Exact, Rule, Top1
from common.artifact.tensors import Array
from common.wire import Shadow, ShadowReport, SideReport


class Compared(NamedTuple):
    """One request: seconds in the engine, None for a release that failed on it; `agrees` counts where both answered."""

    live_s: float | None
    candidate_s: float | None
    agrees: bool = False


class Side(msgspec.Struct, frozen=True):
    """The sums of one release."""

    requests: int = 0
    errors: int = 0
    seconds: float = 0.0

    def plus(self, seconds: float | None) -> "Side":
        failed = seconds is None
        return Side(self.requests + 1, self.errors + failed, self.seconds + (seconds or 0.0))

    def report(self) -> SideReport:
        answered = self.requests - self.errors
        mean = self.seconds / answered if answered else None
        return SideReport(requests=self.requests, errors=self.errors, latency_s=mean)


class Agreement(msgspec.Struct, frozen=True):
    """The sum of comparisons so far."""

    samples: int = 0
    agreed: int = 0
    live: Side = Side()
    candidate: Side = Side()

    def plus(self, one: Compared) -> "Agreement":
        """This and one comparison more."""
        sample = one.live_s is not None
        return replace(
            self,
            samples=self.samples + sample,
            agreed=self.agreed + (sample and one.candidate_s is not None and one.agrees),
            live=self.live.plus(one.live_s),
            candidate=self.candidate.plus(one.candidate_s),
        )

    def report(self, dropped: int) -> ShadowReport:
        """For the controller; nobody has judged it yet."""
        return ShadowReport(
            samples=self.samples,
            agreed=self.agreed,
            dropped=dropped,
            live=self.live.report(),
            candidate=self.candidate.report(),
        )


def answers_agree(terms: Shadow, live: Mapping[str, Array], candidate: Mapping[str, Array]) -> bool:
    """Whether all outputs agree, on the terms of the order."""
    return live.keys() == candidate.keys() and all(
        differs(rule_for(terms, array), array, candidate[name]) is None for name, array in live.items()
    )


def rule_for(terms: Shadow, output: Array) -> Rule:
    """Floats are near or have the same largest element, where there are several to choose from; the rest is equal."""
    if output.dtype.kind != "f" or not output.size:
        return Exact()
    if terms.agree == "top1" and output.ndim and output.shape[-1] > 1:
        return Top1()
    return Close(rtol=terms.rtol, atol=terms.atol)
