"""The update machine: one table says what every event does in every stage.

`TABLE` holds every (stage, event) pair that does something, with the stages it may lead to; `IGNORED` holds all others.
A test proves that together they are every pair, and the diagram in docs/explanation/update-machine.md is drawn from the
table. What holds in every state:

- `installed` is complete and verified, and nothing overwrites its slot until another release has been committed.
- Bytes in quarantine are not tried again until an order with a higher number asks for them.
- Nothing is fetched that the order's byte budget does not allow; an order over it waits for a better offer, or fails.
- Trouble that may pass (network, disk) is waited for with a growing delay and never becomes a verdict; bytes that come
  wrong, and candidates that are too slow, that the program does not survive or for which the installed release has to
  leave the memory, are tried a limited number of times.
- Whatever goes on from `REPLACING`, but for the switch, lets the installed release answer again first.
- A candidate that answers has been compared with the installed release, if the order says so and memory held both.

What a restart does is the answer to `Restarted`, which every stage answers; `resume` is another name for it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from edge_agent.update import events as ev
from edge_agent.update import moves
from edge_agent.update.outcomes import Step
from edge_agent.update.state import ModelState, Stage

IDLE, FETCHING, VERIFYING, WARMING = Stage.IDLE, Stage.FETCHING, Stage.VERIFYING, Stage.WARMING
SHADOWING, REPLACING, SWITCHING, PROBATION = Stage.SHADOWING, Stage.REPLACING, Stage.SWITCHING, Stage.PROBATION
FAILED, RETIRED = Stage.FAILED, Stage.RETIRED

ALL = frozenset(Stage)
WAITING = frozenset({IDLE, FAILED, RETIRED})
GETTING = frozenset({FETCHING, VERIFYING})
LOADING = frozenset({WARMING, SWITCHING})
TRIED = frozenset({WARMING, SHADOWING, REPLACING, SWITCHING, PROBATION})
"""There is a candidate, in memory or on its way there."""
BEGUN = frozenset({FETCHING, IDLE, FAILED})
"""Where taking up an order may lead: work, nothing to do, or quarantined bytes."""


class Move(NamedTuple):
    """What an event does in some stages, and where that may lead besides staying; `words` label it in the diagram."""

    event: type[ev.Event]
    stages: frozenset[Stage]
    act: Callable[[ModelState, Any], Step]
    to: frozenset[Stage]
    words: str


def _move(
    event: type[ev.Event],
    stages: Iterable[Stage],
    act: Callable[[ModelState, Any], Step],
    to: Iterable[Stage],
    words: str,
) -> Move:
    return Move(event, frozenset(stages), act, frozenset(to), words)


MOVES = (
    _move(ev.Ordered, {IDLE, FAILED}, moves.take_up, BEGUN, "order"),
    _move(ev.Ordered, {RETIRED}, moves.take_up, {FETCHING, FAILED}, "order"),
    _move(ev.Ordered, GETTING | LOADING, moves.redirect, BEGUN, "newer order"),
    _move(ev.Ordered, {SHADOWING}, moves.redirect_shadow, BEGUN | {WARMING}, "newer order"),
    _move(ev.Ordered, {REPLACING}, moves.redirect_and_serve, BEGUN, "newer order"),
    _move(ev.Ordered, {PROBATION}, moves.overrule, BEGUN, "newer order"),
    _move(ev.Withdrawn, ALL - {RETIRED}, moves.withdraw, {RETIRED}, "left the order"),
    _move(ev.Fetched, {FETCHING}, moves.fetched, {VERIFYING}, "bytes are here"),
    _move(ev.OfferUnusable, GETTING, moves.go_without, {FETCHING}, "offer unusable"),
    _move(ev.OverBudget, {FETCHING}, moves.heed_budget, {FAILED}, "over budget"),
    _move(ev.Corrupted, GETTING, moves.fetch_again, {FETCHING, FAILED}, "wrong bytes"),
    _move(ev.ManifestRefused, {FETCHING}, moves.refuse, {FAILED}, "manifest refused"),
    _move(ev.Interrupted, GETTING, moves.wait, {FETCHING}, "interrupted"),
    _move(ev.Interrupted, {WARMING, PROBATION}, moves.wait, (), "interrupted"),
    _move(ev.Interrupted, {SHADOWING}, moves.shadow_later, {WARMING}, "interrupted"),
    _move(ev.RetryDue, {FETCHING}, moves.fetch_now, (), "retry"),
    _move(ev.RetryDue, {WARMING}, moves.warm_again, (), "retry"),
    _move(ev.RetryDue, {PROBATION}, moves.watch_again, (), "retry"),
    _move(ev.Built, {VERIFYING}, moves.built, {WARMING}, "built and verified"),
    _move(ev.Warmed, {WARMING}, moves.warmed, {SHADOWING, SWITCHING}, "warm"),
    _move(ev.Warmed, {REPLACING}, moves.warmed_in_its_place, {SWITCHING, FAILED}, "warm"),
    _move(ev.ModelRefused, {WARMING}, moves.not_fit, {FAILED}, "engine refuses, wrong answers"),
    _move(ev.TooSlow, {WARMING}, moves.measure_again, {FAILED}, "too slow"),
    _move(ev.NoRoomBeside, {WARMING}, moves.stop_first, {REPLACING, FAILED}, "no memory for both"),
    _move(ev.ModelRefused, {REPLACING}, moves.not_fit_in_its_place, {FAILED}, "engine refuses, wrong answers"),
    _move(ev.TooSlow, {REPLACING}, moves.slow_in_its_place, {WARMING}, "too slow"),
    _move(ev.Interrupted, {REPLACING}, moves.put_back, {WARMING}, "interrupted"),
    _move(ev.SlotLost, {REPLACING}, moves.candidate_lost, {FETCHING, FAILED}, "slot lost"),
    _move(ev.Shadowed, {SHADOWING}, moves.judge_shadow, {SWITCHING, FAILED}, "compared"),
    _move(ev.Switched, {SWITCHING}, moves.on_probation, {PROBATION}, "switched"),
    _move(ev.HealthChecked, {PROBATION}, moves.judge, {IDLE, FAILED}, "verdict"),
    _move(ev.Probed, {PROBATION}, moves.judge_probe, {IDLE, FAILED}, "verdict"),
    _move(ev.Restarted, WAITING, moves.stand_up, (), "restart"),
    _move(ev.Restarted, GETTING, moves.resume_fetching, {FETCHING}, "restart"),
    _move(ev.Restarted, TRIED, moves.strike, {WARMING, FAILED}, "restart"),
    _move(ev.SlotLost, {IDLE}, moves.slot_lost, {FETCHING}, "slot lost"),
    _move(ev.SlotLost, GETTING, moves.slot_lost, {FETCHING}, "slot lost"),
    _move(ev.SlotLost, {WARMING}, moves.slot_lost, {FETCHING, FAILED}, "slot lost"),
    _move(ev.SlotLost, {FAILED}, moves.slot_lost, (), "slot lost"),
    _move(ev.Mended, GETTING | {IDLE, WARMING, SHADOWING, FAILED}, moves.mended, (), "mended"),
    _move(ev.Wanted, GETTING | {IDLE, WARMING, SHADOWING, FAILED}, moves.wake, (), "wanted"),
    _move(ev.Unservable, {IDLE}, moves.unservable, {FAILED, WARMING}, "will not load or answers wrongly"),
    _move(ev.Unservable, GETTING | {WARMING, FAILED}, moves.unservable, (), "will not load or answers wrongly"),
)

TABLE = {(stage, move.event): move for move in MOVES for stage in move.stages}

IGNORED: dict[type[ev.Event], frozenset[Stage]] = {
    ev.Withdrawn: frozenset({RETIRED}),
    # The end of work that was cancelled, or that a restart has begun again.
    ev.Fetched: ALL - {FETCHING},
    ev.OfferUnusable: ALL - {FETCHING, VERIFYING},
    ev.OverBudget: ALL - {FETCHING},
    ev.Corrupted: ALL - {FETCHING, VERIFYING},
    ev.ManifestRefused: ALL - {FETCHING},
    ev.Interrupted: ALL - GETTING - {WARMING, SHADOWING, REPLACING, PROBATION},
    ev.RetryDue: ALL - {FETCHING, WARMING, PROBATION},
    ev.Built: ALL - {VERIFYING},
    ev.Warmed: ALL - {WARMING, REPLACING},
    ev.ModelRefused: ALL - {WARMING, REPLACING},
    ev.TooSlow: ALL - {WARMING, REPLACING},
    ev.NoRoomBeside: ALL - {WARMING},
    ev.Shadowed: ALL - {SHADOWING},
    ev.Switched: ALL - {SWITCHING},
    ev.HealthChecked: ALL - {PROBATION},
    ev.Probed: ALL - {PROBATION},
    # Slots are checked before they are loaded: once a candidate is compared or serves, both are in memory.
    ev.SlotLost: frozenset({SHADOWING, SWITCHING, PROBATION, RETIRED}),
    # Two releases are in memory for a moment, or none; the next look finds out whether that matters.
    ev.Mended: frozenset({REPLACING, SWITCHING, PROBATION, RETIRED}),
    # What is being tried answers, or is about to.
    ev.Wanted: frozenset({REPLACING, SWITCHING, PROBATION, RETIRED}),
    ev.Unservable: frozenset({SHADOWING, REPLACING, SWITCHING, PROBATION, RETIRED}),
}


def step(state: ModelState, event: ev.Event) -> Step:
    """The state after `event`, and what to do about it once that state is saved."""
    move = TABLE.get((state.stage, type(event)))
    return move.act(state, event) if move else (state, ())


def resume(state: ModelState, *, clean: bool, at: float) -> Step:
    """What to do with `state` when the program starts; `clean` if its last run ended in good order."""
    return step(state, ev.Restarted(at=at, clean=clean))
