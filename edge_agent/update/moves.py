"""What each event does: the right-hand side of the table in `machine`."""

from msgspec.structs import replace

from common.wire import DesiredModel, Split
from edge_agent.update import events as ev
from edge_agent.update import shadow
from edge_agent.update.choice import offered
from edge_agent.update.outcomes import (
    REDOWNLOADS_MAX,
    REPLACEMENTS_MAX,
    SLOW_TRIES_MAX,
    STRIKES_MAX,
    Step,
    adopted,
    begin,
    committed,
    expected,
    fetching,
    given_up,
    refetch,
    settled,
)
from edge_agent.update.state import Installed, ModelState, Stage, Tally, idle_slot, is_release, same_release

# Orders.


def take_up(state: ModelState, event: ev.Ordered) -> Step:
    """Idle, failed or retired: begin, unless it is the order that was dealt with already."""
    if state.order >= event.target.order and same_release(state.target, event.target) and state.stage != Stage.RETIRED:
        return renewed(state, event), ()
    return begin(state, event.target, event.traceparent, event.at)


def redirect(state: ModelState, event: ev.Ordered) -> Step:
    """Before the switch: go on if the release is still wanted, otherwise drop it and begin anew.

    While it is being fetched, other offers or another budget are a reason to choose again.
    """
    if same_release(state.target, event.target):
        again = renewed(state, event)
        choose_again = again.stage is Stage.FETCHING and again.target != state.target
        return again, (fetching(again),) if choose_again else ()
    fresh, effects = begin(state, event.target, event.traceparent, event.at)
    return fresh, (ev.Cancel(), *effects)


def redirect_and_serve(state: ModelState, event: ev.Ordered) -> Step:
    """While the installed release is out of memory: as before the switch, but it answers again first."""
    after, effects = redirect(state, event)
    return after, _served_again(after, effects)


def redirect_shadow(state: ModelState, event: ev.Ordered) -> Step:
    """While requests are mirrored: as before the switch; other terms for that begin the trial anew, from loading."""
    again = renewed(state, event)
    if not same_release(state.target, event.target) or again.target is None or state.target is None:
        return redirect(state, event)
    if again.target.shadow == state.target.shadow:
        return again, ()
    return replace(again, stage=Stage.WARMING), (ev.Warm(candidate=tried(again)),)


def overrule(state: ModelState, event: ev.Ordered) -> Step:
    """In probation: go on if the release is still wanted; otherwise put the proven one back first.

    Without a proven one the candidate, complete and not found unhealthy, stays: something must answer meanwhile. Who
    answers how much, and for how long, may be told anew.
    """
    if same_release(state.target, event.target):
        again = renewed(state, event)
        return again, changed_terms(expected(state), expected(again))
    if state.installed is None:
        fresh, effects = begin(adopted(state), event.target, event.traceparent, event.at)
        return fresh, (ev.Cancel(), ev.Commit(), *effects)
    fresh, effects = begin(state, event.target, event.traceparent, event.at)
    return fresh, (ev.Cancel(), ev.Revert(), *effects)


def changed_terms(before: DesiredModel, after: DesiredModel) -> tuple[ev.Effect, ...]:
    """What other terms for the same release mean in probation."""
    divide = (ev.Divide(split=split_of(after)),) if split_of(before) != split_of(after) else ()
    watch = (ev.Watch(probation_s=after.probation_s),) if before.probation_s != after.probation_s else ()
    return (*divide, *watch)


def renewed(state: ModelState, event: ev.Ordered) -> ModelState:
    """The same release, told again, perhaps with other offers. A lower order number is never taken over."""
    order = max(event.target.order, expected(state).order)
    refused = tuple(offer for offer in state.refused if offer in offered(event.target))
    return replace(state, target=replace(event.target, order=order), order=max(state.order, order), refused=refused)


def withdraw(state: ModelState, _: ev.Withdrawn) -> Step:
    """Out of service, files and all; only the failures are remembered."""
    retired = ModelState(
        model=state.model,
        stage=Stage.RETIRED,
        order=state.order,
        quarantine=state.quarantine,
        last_update=state.last_update,
    )
    return retired, (ev.Cancel(), ev.Retire(), ev.Tidy())


# Getting the bytes.


def fetched(state: ModelState, event: ev.Fetched) -> Step:
    """Everything is here: build it."""
    building = replace(state, stage=Stage.VERIFYING, tally=state.tally.plus(event.spent), attempt=0, trouble="")
    return building, (ev.Build(target=expected(state), sources=event.sources, slot=idle_slot(state)),)


def go_without(state: ModelState, event: ev.OfferUnusable) -> Step:
    """Choose again without that offer, for the rest of this update."""
    refused = (*state.refused, event.offer) if event.offer not in state.refused else state.refused
    return refetch(state, tally=state.tally.plus(event.spent), refused=refused, refusal=event.detail)


def heed_budget(state: ModelState, event: ev.OverBudget) -> Step:
    """Too dear: wait for a better offer and keep what came, or fail, as the order says; the release is not to blame."""
    spent = replace(state, tally=state.tally.plus(event.spent), attempt=0)
    detail = f"the smallest needs {event.needs:_} bytes, the budget is {event.budget:_}".replace("_", " ")
    if expected(state).on_exceed == "fail":
        return settled(spent, "failed", event.at, "over_budget", detail), (ev.Tidy(),)
    return replace(spent, trouble=f"waiting for a cheaper way: {detail}"), ()


def fetch_again(state: ModelState, event: ev.Corrupted) -> Step:
    """Wrong bytes: perhaps the network's fault once, the source's if it happens again."""
    spent = replace(state, tally=state.tally.plus(event.spent))
    if state.redownloads < REDOWNLOADS_MAX:
        return refetch(spent, redownloads=state.redownloads + 1)
    return given_up(spent, "failed", event.at, "integrity_failure", event.detail), (ev.Tidy(),)


def refuse(state: ModelState, event: ev.ManifestRefused) -> Step:
    """Order and manifest do not agree, or nobody we trust signed it."""
    spent = replace(state, tally=state.tally.plus(event.spent))
    return given_up(spent, "rejected", event.at, event.code, event.detail), (ev.Tidy(),)


def wait(state: ModelState, event: ev.Interrupted) -> Step:
    """Transient: try again later, from fetching unless the candidate is complete already."""
    stage = state.stage if state.candidate is not None else Stage.FETCHING
    waiting = replace(
        state,
        stage=stage,
        attempt=state.attempt + 1,
        tally=state.tally.plus(event.spent),
        trouble=f"{event.code}: {event.detail}",
    )
    return waiting, (ev.Wait(attempt=state.attempt),)


def fetch_now(state: ModelState, _: ev.RetryDue) -> Step:
    """The wait is over."""
    return state, (fetching(state),)


def built(state: ModelState, event: ev.Built) -> Step:
    """The idle slot is full and named from now on; what it held before is gone."""
    warming = replace(state, stage=Stage.WARMING, candidate=event.candidate, previous=None, attempt=0, trouble="")
    return warming, (ev.Warm(candidate=event.candidate),)


# Trying the candidate.


def warm_again(state: ModelState, _: ev.RetryDue) -> Step:
    """The wait is over, and the candidate still stands in its slot."""
    return state, (ev.Warm(candidate=tried(state)),)


def warmed(state: ModelState, event: ev.Warmed) -> Step:
    """Compare it on live requests first, if the order says so; otherwise switch."""
    state = replace(state, run_s=event.run_s)
    terms = shadow.due(state)
    if terms is None:
        return switch(state)
    return replace(state, stage=Stage.SHADOWING, attempt=0, trouble=""), (ev.Mirror(terms=terms),)


def switch(state: ModelState) -> Step:
    """Written down before it is done, so that a crash in between counts against the candidate."""
    switching = replace(state, stage=Stage.SWITCHING, attempt=0, trouble="")
    return switching, (ev.Switch(split=split_of(expected(state))),)


def judge_shadow(state: ModelState, event: ev.Shadowed) -> Step:
    """Too little agreement refuses the release; too few requests say nothing, and the order says what then."""
    terms = expected(state).shadow
    if not terms:
        raise AssertionError(f"{state.model} was compared without terms")
    found = shadow.judged(terms, event.found)
    seen = replace(state, shadow=found)
    if found.verdict == "fail":
        detail = shadow.in_words(terms, found)
        return given_up(seen, "failed", event.at, "disagreement", detail), (ev.Cancel(), ev.Tidy())
    if found.verdict == "inconclusive" and terms.on_few == "fail":
        return _not_compared(seen, event.at, shadow.in_words(terms, found))
    return switch(seen)


def _not_compared(state: ModelState, at: float, detail: str) -> Step:
    """The order wants a comparison and there was none to speak of; the release is not to blame."""
    failed = settled(state, "failed", at, "shadow_inconclusive", detail)
    return replace(failed, candidate=None), (ev.Cancel(), ev.Tidy())


def shadow_later(state: ModelState, event: ev.Interrupted) -> Step:
    """The candidate is not in memory any more: load it again later, and begin the trial anew."""
    waiting, effects = wait(state, event)
    return replace(waiting, stage=Stage.WARMING), effects


def not_fit(state: ModelState, event: ev.ModelRefused) -> Step:
    """It never served."""
    return given_up(state, "failed", event.at, event.code, event.detail), (ev.Tidy(),)


def measure_again(state: ModelState, event: ev.TooSlow) -> Step:
    """Slower than its self-test allows: measure again later, for the device may be busy; after some tries it fails."""
    slow = replace(state, slow_tries=state.slow_tries + 1)
    if slow.slow_tries >= SLOW_TRIES_MAX:
        detail = f"too slow {SLOW_TRIES_MAX} times: {event.detail}"
        return given_up(slow, "failed", event.at, "self_test_failed", detail), (ev.Tidy(),)
    waiting = replace(slow, attempt=state.attempt + 1, trouble=f"measuring again later: {event.detail}")
    return waiting, (ev.Wait(attempt=state.attempt),)


def stop_first(state: ModelState, event: ev.NoRoomBeside) -> Step:
    """One of the two must go: the installed release leaves the memory for the candidate, a limited number of times.

    Two releases that are never in memory together cannot be compared. An order that takes no update without that fails
    here, while the installed release still answers.
    """
    if shadow.must_compare(state):
        return _not_compared(replace(state, shadow=shadow.NOTHING_SEEN), event.at, shadow.alone_in_words(event.detail))
    if state.replacements >= REPLACEMENTS_MAX:
        detail = f"no memory, {REPLACEMENTS_MAX} times: {event.detail}"
        return replace(settled(state, "failed", event.at, "no_memory", detail), candidate=None), (ev.Tidy(),)
    trouble = f"replacing what serves: {event.detail}"
    replacing = replace(state, stage=Stage.REPLACING, replacements=state.replacements + 1, trouble=trouble)
    return replacing, (ev.StopServing(), ev.Warm(candidate=tried(state)))


def warmed_in_its_place(state: ModelState, event: ev.Warmed) -> Step:
    """There is nothing to compare it with: the report says so, and the update goes on unless the order forbids that."""
    if shadow.must_compare(state):  # terms that came after the installed release had left
        unseen = replace(state, shadow=shadow.NOTHING_SEEN)
        after, effects = _not_compared(unseen, event.at, shadow.alone_in_words(state.trouble))
        return after, _served_again(after, effects)
    state = replace(state, run_s=event.run_s)
    return switch(replace(state, shadow=shadow.NOTHING_SEEN) if shadow.due(state) else state)


def not_fit_in_its_place(state: ModelState, event: ev.ModelRefused) -> Step:
    """It never served; the installed release answers again."""
    after, effects = not_fit(state, event)
    return after, _served_again(after, effects)


def slow_in_its_place(state: ModelState, event: ev.TooSlow) -> Step:
    """Slower than its self-test allows: the installed release answers again; the tries are limited anyway."""
    trouble = f"measuring again later: {event.detail}"
    waiting = replace(state, stage=Stage.WARMING, attempt=state.attempt + 1, trouble=trouble)
    return waiting, _served_again(waiting, (ev.Wait(attempt=state.attempt),))


def put_back(state: ModelState, event: ev.Interrupted) -> Step:
    """Transient: the installed release answers again, and later it is tried once more."""
    after, effects = wait(replace(state, stage=Stage.WARMING), event)
    return after, _served_again(after, effects)


def candidate_lost(state: ModelState, event: ev.SlotLost) -> Step:
    """The candidate's slot went bad: the installed release answers again, and its own slot is looked at then."""
    if tried(state).slot != event.slot:
        return state, ()
    after, effects = slot_lost(state, event)
    return after, _served_again(after, effects)


def _served_again(state: ModelState, effects: tuple[ev.Effect, ...]) -> tuple[ev.Effect, ...]:
    """`effects`, and before them the installed release's, unless it is still out of memory."""
    if state.stage is Stage.REPLACING:
        return effects
    cancel = tuple(effect for effect in effects if isinstance(effect, ev.Cancel))
    others = tuple(effect for effect in effects if not isinstance(effect, ev.Cancel))
    return (*cancel, *serving(state), *others)


def on_probation(state: ModelState, event: ev.Switched) -> Step:
    """It serves; the old release stands behind it until it has proven itself."""
    candidate = replace(tried(state), activated_at=event.at)
    return replace(state, stage=Stage.PROBATION, candidate=candidate), (
        ev.Watch(probation_s=expected(state).probation_s),
    )


def judge(state: ModelState, event: ev.HealthChecked) -> Step:
    """Bad news counts at once, good news when the time is up, no news asks for a probe."""
    state = replace(state, split=event.split or state.split)
    if event.verdict == "fail":
        return unhealthy(state, event.at, event.detail)
    if event.elapsed_s < expected(state).probation_s:
        return state, (ev.Watch(probation_s=expected(state).probation_s),)
    return committed(state, event.at) if event.verdict == "pass" else (state, (ev.Probe(),))


def judge_probe(state: ModelState, event: ev.Probed) -> Step:
    """The agent's own requests decide when there were too few others; if even they say nothing, keep watching."""
    if event.verdict == "fail":
        return unhealthy(state, event.at, event.detail)
    if event.verdict == "pass":
        return committed(state, event.at)
    return replace(state, attempt=state.attempt + 1), (ev.Wait(attempt=state.attempt),)


def watch_again(state: ModelState, _: ev.RetryDue) -> Step:
    """The wait is over; the candidate is still in probation."""
    return state, (ev.Watch(probation_s=expected(state).probation_s),)


def unhealthy(state: ModelState, at: float, detail: str) -> Step:
    """Put the old release back at once; the network is not asked."""
    return given_up(state, "rolled_back", at, "unhealthy", detail), (ev.Cancel(), ev.Revert(), ev.Tidy())


# After a restart.


def stand_up(state: ModelState, _: ev.Restarted) -> Step:
    """Nothing was under way."""
    return state, serving(state)


def resume_fetching(state: ModelState, _: ev.Restarted) -> Step:
    """Before the candidate was complete: go on fetching; the download resumes where it stopped."""
    again, effects = refetch(state, attempt=0, trouble="")
    return again, (*serving(state), *effects)


def strike(state: ModelState, event: ev.Restarted) -> Step:
    """The candidate was loaded or served: load it again, unless the program died over it too often."""
    strikes = state.strikes + (not event.clean)
    if strikes < STRIKES_MAX:
        again = replace(state, stage=Stage.WARMING, strikes=strikes, attempt=0, trouble="")
        return again, (*serving(state), ev.Warm(candidate=tried(state)))
    served = tried(state).activated_at is not None
    detail = f"the agent died {strikes} times while it tried {expected(state).version}"
    over = given_up(state, "rolled_back" if served else "failed", event.at, "unclean_restarts", detail)
    return over, (*serving(over), ev.Tidy())


def serving(state: ModelState) -> tuple[ev.Effect, ...]:
    """What answers before anything else happens."""
    return (ev.Serve(installed=state.installed),) if state.installed else ()


def slot_lost(state: ModelState, event: ev.SlotLost) -> Step:
    """Nothing in the slot is used any more: fall back to the other one, and fetch what is missing."""
    installed = _unless_in(event, state.installed)
    sound = replace(
        state,
        installed=installed or _unless_in(event, state.previous),
        candidate=_unless_in(event, state.candidate),
        previous=_unless_in(event, state.previous) if installed else None,
    )
    if sound.candidate != state.candidate:
        return _build_again(sound, event)
    if sound.installed != state.installed:
        return _without_installed(sound, event)
    if sound.previous != state.previous and state.stage in {Stage.FETCHING, Stage.VERIFYING}:
        fresh, effects = refetch(sound)
        return fresh, (ev.Cancel(), ev.Tidy(), *effects)
    return sound, (ev.Tidy(),)


def _build_again(state: ModelState, event: ev.SlotLost) -> Step:
    """The candidate's slot went bad after it was verified: the disk may be failing, so not without end."""
    if state.redownloads < REDOWNLOADS_MAX:
        fresh, effects = refetch(state, redownloads=state.redownloads + 1)
        return fresh, (ev.Cancel(), *effects)
    detail = "the files of the new release went bad on this device's disk"
    return given_up(state, "failed", event.at, "integrity_failure", detail), (ev.Cancel(), ev.Tidy())


def _without_installed(state: ModelState, event: ev.SlotLost) -> Step:
    if state.stage is Stage.IDLE and state.target is not None:
        fresh, effects = begin(state, state.target, state.traceparent, event.at)
        return fresh, (*serving(state), *effects)
    if state.stage in {Stage.FETCHING, Stage.VERIFYING}:  # perhaps from a patch on what is gone
        fresh, effects = refetch(state)
        return fresh, (*serving(state), ev.Cancel(), *effects)
    return state, serving(state)


def mended(state: ModelState, event: ev.Mended) -> Step:
    """Load it again if it serves: what the engine keeps mapped may have been read while it was bad."""
    serves = state.installed is not None and state.installed.slot == event.slot
    return state, serving(state) if serves else ()


def unservable(state: ModelState, event: ev.Unservable) -> Step:
    """Intact bytes that this engine will not load or answers wrongly with: the previous release, no second download."""
    if event.mendable and state.stage is Stage.IDLE and is_release(state.installed, expected(state)):
        return lacking(state, event)
    fallen = replace(state, installed=state.previous, previous=None)
    if state.stage is Stage.IDLE:
        fallen = given_up(fallen, "failed", event.at, event.code, event.detail)
    return fallen, serving(fallen)


def wake(state: ModelState, _: ev.Wanted) -> Step:
    """Load it now."""
    return state, (ev.Serve(installed=state.installed, awake=True),) if state.installed else ()


def lacking(state: ModelState, event: ev.Unservable) -> Step:
    """A plug-in is gone: no verdict. The release is a candidate again until it is back; the previous one serves."""
    waiting = replace(
        state,
        stage=Stage.WARMING,
        installed=state.previous,
        candidate=state.installed,
        previous=None,
        attempt=1,
        tally=Tally(),
        started_at=event.at,
        trouble=f"{event.code}: {event.detail}",
    )
    return waiting, (*serving(waiting), ev.Wait(attempt=0))


def tried(state: ModelState) -> Installed:
    """The candidate; the stages from warming to probation have one."""
    if state.candidate is None:
        raise AssertionError(f"{state.model} is {state.stage} without a candidate")
    return state.candidate


def split_of(target: DesiredModel) -> Split | None:
    """How the requests are divided in probation; None: not at all."""
    return target.split or None


def _unless_in(event: ev.SlotLost, release: Installed | None) -> Installed | None:
    return None if release is None or release.slot == event.slot else release
