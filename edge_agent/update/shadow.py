"""When a candidate is put through a shadow trial, and what the machine makes of what was found.

Three verdicts: too few samples say nothing, neither well nor ill, and the order says what an update does then. Where
memory holds one release at a time there are none at all (`NOTHING_SEEN`).
"""

from msgspec import UNSET
from msgspec.structs import replace

from common.wire import Shadow, ShadowReport
from edge_agent.update.outcomes import expected
from edge_agent.update.state import ModelState

NOTHING_SEEN = ShadowReport(verdict="inconclusive")
"""What is found of two releases that cannot be in memory together."""


def due(state: ModelState) -> Shadow | None:
    """The terms of the trial that a warm candidate has still to go through: there must be something to compare with."""
    terms = expected(state).shadow
    seen = state.shadow not in (None, NOTHING_SEEN)
    return None if terms is UNSET or state.installed is None or seen else terms


def must_compare(state: ModelState) -> bool:
    """Whether the order takes no candidate that was not compared, and this one has still to be."""
    terms = due(state)
    return terms is not None and terms.on_few == "fail"


def judged(terms: Shadow, found: ShadowReport) -> ShadowReport:
    """`found` with its verdict."""
    if found.samples < terms.samples_min:
        return replace(found, verdict="inconclusive")
    if terms.agreement_min is None:
        return found
    enough = found.agreed >= terms.agreement_min * found.samples
    return replace(found, verdict="pass" if enough else "fail")


def in_words(terms: Shadow, found: ShadowReport) -> str:
    """Why the verdict on `found` is not a good one."""
    if found.verdict == "inconclusive":
        dropped = f", {found.dropped} found no free core" if found.dropped else ""
        return f"{found.samples} live requests were compared{dropped}; a judgement takes {terms.samples_min}"
    errors = f", {found.candidate.errors} of them failed on it" if found.candidate.errors else ""
    return (
        f"the new release agrees with the running one on {found.agreed} of {found.samples} live requests{errors}; "
        f"a share of {terms.agreement_min:g} is asked for"
    )


def alone_in_words(shortage: str) -> str:
    """Why nothing was compared; `shortage` is what is the matter with the memory."""
    return f"memory does not hold the new release beside the running one, so nothing was compared: {shortage}"
