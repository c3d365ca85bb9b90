"""What an order says about the requests that a new release gets while it is tried, and what the device found out.

Two terms of an update, each may be left out. `Shadow`: before the switch, live requests are also put to the candidate,
and its answers are compared with those that the callers got; nobody ever sees them. `Split`: after the switch, in
probation, the candidate answers only some of the requests and the proven release the others.

    >>> Shadow(for_s=600, share=0.1, agreement_min=0.98).samples_min
    20
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

SHADOW_S_MAX = 86_400
SAMPLES_MAX = 1_000_000
HEADER_NAME = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$(?!\n)"
"""A token of RFC 9110, section 5.6.2, of at most 64 characters."""

Agree = Literal["close", "top1"]
"""When two answers agree: floats are near, or the largest one of each row is at the same place. The rest is equal."""
OnFew = Literal["go_on", "fail"]
"""What an update does that saw too few requests in its shadow time."""
Verdict = Literal["pass", "fail", "inconclusive", "unjudged"]

HeaderName = Annotated[str, Meta(pattern=HEADER_NAME)]
Number = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Tolerance = Annotated[float, Meta(ge=0)]


class Shadow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Try the release on live requests before it answers any.

    For `for_s` seconds a `share` of the requests (0 to 1) is put to the candidate too. Of answers that are compared the
    share `agreement_min` must agree, or the release is refused; without it nothing is judged.
    """

    for_s: Annotated[float, Meta(gt=0, le=SHADOW_S_MAX)]
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    agree: Agree = "close"
    """`close`: |candidate - live| <= atol + rtol * |live|. `top1`: by the last axis, if that has several elements."""
    rtol: Tolerance = 1e-2
    atol: Tolerance = 1e-3
    agreement_min: Annotated[float, Meta(gt=0, le=1)] | None = None
    samples_min: Annotated[int, Meta(ge=1, le=SAMPLES_MAX)] = 20
    """Compared answers that a judgement takes; fewer say nothing."""
    on_few: OnFew = "go_on"


class Split(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who answers in probation: the candidate a `share` of the requests (0 to 1), the proven release the others.

    A request decides for itself if it carries `header`, an HTTP header or a request parameter of this name, with the
    value `candidate` or `stable`. Requests with the same value of `key`, likewise, are all answered by the same side.
    """

    share: Annotated[float, Meta(ge=0, le=1)]
    header: HeaderName | None = None
    key: HeaderName | None = None

    def __post_init__(self) -> None:
        if self.share == 0 and self.header is None:
            raise ValueError("a share of 0 without a header lets nobody reach the candidate")


class SideReport(msgspec.Struct, frozen=True, kw_only=True):
    """How one release did: `latency_s` is the mean time in the engine of requests that it answered well, in seconds."""

    requests: Number = 0
    errors: Number = 0
    latency_s: float | None = None


class ShadowReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a shadow trial found. Both sides are of the same requests, those that both had; `samples` of them the live
    release answered well, and on `agreed` of these the candidate agreed. `dropped` requests found no free core in time.
    """

    verdict: Verdict = "unjudged"
    samples: Number = 0
    agreed: Number = 0
    dropped: Number = 0
    live: SideReport = SideReport()
    candidate: SideReport = SideReport()

    @property
    def agreement(self) -> float | None:
        """The share of samples that agreed; None without any."""
        return self.agreed / self.samples if self.samples else None


class SplitReport(msgspec.Struct, frozen=True, kw_only=True):
    """How both releases did side by side, from the switch to the end of the probation."""

    candidate: SideReport
    stable: SideReport
