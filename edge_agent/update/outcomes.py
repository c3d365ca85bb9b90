"""How an update begins and the ways in which it can end; the table's moves are put together from these.

Each function takes a state and gives the next one with the effects that belong to it.
"""

from msgspec import UNSET
from msgspec.structs import replace

from common.wire import DesiredModel, Outcome, UpdateReport
from common.wire.messages import TEXT_CHARS_MAX
from edge_agent.update import events as ev
from edge_agent.update.state import (
    QUARANTINE_MAX,
    Installed,
    ModelState,
    Quarantined,
    Stage,
    Tally,
    fingerprint,
    is_quarantined,
    is_release,
)

REDOWNLOADS_MAX = 1
"""Bytes that came wrong are fetched from the start this many times."""
SLOW_TRIES_MAX = 8
"""A candidate that was slower than its self-test allows this many times is given up; a busy device had its pauses."""
REPLACEMENTS_MAX = 3
"""For one order the installed release is taken out of memory so often; each time nothing answers for a while."""
STRIKES_MAX = 2
"""A candidate during which the program died this many times is taken back."""

Step = tuple[ModelState, tuple[ev.Effect, ...]]


def begin(state: ModelState, target: DesiredModel, traceparent: str | None, at: float) -> Step:
    """Take up an order. Whatever was under way must have been cancelled; a candidate is forgotten.

    What another order has downloaded is removed, unless this one could have it: a budget is for one order's bytes.
    """
    fresh = replace(
        state,
        stage=Stage.FETCHING,
        order=max(state.order, target.order),
        target=target,
        traceparent=traceparent,
        candidate=None,
        tally=Tally(),
        attempt=0,
        redownloads=0,
        slow_tries=0,
        replacements=0,
        strikes=0,
        refused=(),
        refusal="",
        shadow=None,
        split=None,
        run_s=None,
        trouble="",
        started_at=at,
    )
    if is_release(state.installed, target):
        return settled(fresh, "succeeded", at), (ev.Tidy(),)
    if is_quarantined(fresh, target):
        detail = f"{target.version} failed on this device before; only a newer order tries it again"
        return settled(fresh, "failed", at, "quarantined", detail), (ev.Tidy(),)
    return fresh, (ev.Tidy(), fetching(fresh))


def fetching(state: ModelState) -> ev.Fetch:
    """The effect that gets what `state` still needs."""
    return ev.Fetch(target=expected(state))


def refetch(state: ModelState, **changes: object) -> Step:
    """Go back to fetching; what is complete on the disk is not fetched again."""
    back = replace(state, stage=Stage.FETCHING, candidate=None, **changes)
    return back, (fetching(back),)


def committed(state: ModelState, at: float) -> Step:
    """The candidate has proven itself: it is the installed release now, and what it replaced the previous one."""
    done = adopted(state)
    files = fingerprint(expected(state))
    done = replace(done, quarantine=tuple(entry for entry in done.quarantine if entry.files != files))
    return settled(done, "succeeded", at), (ev.Commit(), ev.Tidy())


def adopted(state: ModelState) -> ModelState:
    """The candidate in the place of the installed release."""
    return replace(state, installed=state.candidate, previous=state.installed, candidate=None)


def given_up(state: ModelState, outcome: Outcome, at: float, code: str, detail: str) -> ModelState:
    """The order cannot be carried out with these bytes; they go into quarantine."""
    target = expected(state)
    entry = Quarantined(files=fingerprint(target), version=target.version, order=target.order, reason=code)
    others = tuple(other for other in state.quarantine if other.files != entry.files)
    failed = replace(state, quarantine=(*others, entry)[-QUARANTINE_MAX:])
    return replace(settled(failed, outcome, at, code, detail), candidate=None)


def settled(state: ModelState, outcome: Outcome, at: float, code: str = "", detail: str = "") -> ModelState:
    """The update is over; `code` and `detail` say why it failed."""
    target = expected(state)
    stage = Stage.IDLE if outcome == "succeeded" else Stage.FAILED
    served: Installed | None = state.installed if outcome == "succeeded" else state.candidate
    report = UpdateReport(
        generation=target.order,
        version=target.version,
        outcome=outcome,
        reason=code,
        detail=(detail or state.refusal)[:TEXT_CHARS_MAX],
        strategy=state.tally.strategy,
        transport=state.tally.transport,
        bytes_transferred=state.tally.bytes_transferred,
        full_bytes=target.size,
        resumed_bytes=state.tally.resumed_bytes,
        started_at=state.started_at,
        activated_at=served.activated_at if served else None,
        finished_at=at,
        shadow=state.shadow or UNSET,
        split=state.split or UNSET,
        variant=target.variant if target.measure else UNSET,
        run_s=UNSET if state.run_s is None or not target.measure else state.run_s,
    )
    return replace(state, stage=stage, last_update=report, attempt=0, strikes=0, redownloads=0, trouble="")


def expected(state: ModelState) -> DesiredModel:
    """The order under way; every stage but the first and the last has one."""
    if state.target is None:
        raise AssertionError(f"{state.model} is {state.stage} without an order")
    return state.target
