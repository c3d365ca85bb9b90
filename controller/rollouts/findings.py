"""What devices found out about a release on live requests, as sentences for people. Pure."""

from common.wire import ShadowReport, SideReport, SplitReport


def shadow_in_words(found: ShadowReport) -> str:
    """What a shadow trial found, the judgement first."""
    agreement = "nothing to compare" if found.agreement is None else f"{100 * found.agreement:.1f} % agree"
    dropped = f", {found.dropped} dropped" if found.dropped else ""
    counted = f"{found.agreed} of {found.samples} requests{dropped}"
    sides = f"running: {_side(found.live)}; new: {_side(found.candidate)}"
    return f"shadow {found.verdict}: {agreement} ({counted}); {sides}"


def split_in_words(found: SplitReport) -> str:
    """How both releases did in probation."""
    return (
        f"split: new: {found.candidate.requests} requests, {_side(found.candidate)}; "
        f"running: {found.stable.requests} requests, {_side(found.stable)}"
    )


def _side(side: SideReport) -> str:
    took = "" if side.latency_s is None else f", {1000 * side.latency_s:.1f} ms"
    return f"{side.errors} errors{took}"
