"""Update machines that are wrong on purpose, each in one way: the invariants of `update_world` must catch them all."""

from msgspec import UNSET
from msgspec.structs import replace

from edge_agent.update import ModelState, Stage, Tally, moves, step
from edge_agent.update import events as ev
from edge_agent.update.outcomes import Step
from tests.property.update_world import Machine


def _overwrites_the_installed_slot(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    slot = state.installed.slot if state.installed else None
    return after, tuple(replace(e, slot=slot) if isinstance(e, ev.Build) and slot else e for e in effects)


def _trusts_before_probation(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return (replace(after, installed=after.candidate) if isinstance(event, ev.Switched) else after), effects


def _commits_at_the_switch(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, ((ev.Commit(), *effects) if isinstance(event, ev.Switched) else effects)


def _forgets_quarantine(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Ordered):
        state = replace(state, quarantine=())
    return step(state, event)


def _takes_any_order(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return (replace(after, order=event.target.order) if isinstance(event, ev.Ordered) else after), effects


def _fetches_wrong_bytes_for_ever(state: ModelState, event: ev.Event) -> Step:
    return step(replace(state, redownloads=0), event)


def _never_strikes(state: ModelState, event: ev.Event) -> Step:
    return step(state, replace(event, clean=True) if isinstance(event, ev.Restarted) else event)


def _condemns_for_a_broken_network(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Interrupted):
        event = ev.ManifestRefused(at=event.at, code=event.code, detail=event.detail)
    return step(state, event)


def _measures_for_ever(state: ModelState, event: ev.Event) -> Step:
    return step(replace(state, slow_tries=0), event)


def _condemns_a_busy_device(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.TooSlow):
        event = ev.ModelRefused(at=event.at, code="self_test_failed", detail=event.detail)
    return step(state, event)


def _gives_up_waiting(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(effect for effect in effects if not isinstance(effect, ev.Wait))


def _serves_nothing_after_a_restart(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(effect for effect in effects if not isinstance(effect, ev.Serve))


def _forgets_what_it_spent(state: ModelState, event: ev.Event) -> Step:
    return step(replace(state, tally=Tally()), event)


def _breaks_the_budget_silently(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.OverBudget) and state.target is not None:
        state, event = replace(state, target=replace(state.target, max_bytes=None)), ev.RetryDue(at=event.at)
    return step(state, event)


def _asks_again_at_once(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, ((*effects, ev.Wait(attempt=0)) if isinstance(event, ev.OverBudget) else effects)


def _fails_where_it_should_wait(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.OverBudget) and state.target is not None:
        after, effects = step(replace(state, target=replace(state.target, on_exceed="fail")), event)
        return replace(after, target=state.target), effects
    return step(state, event)


def _forgets_what_it_refused(state: ModelState, event: ev.Event) -> Step:
    return step(replace(state, refused=()), event)


def _leaves_the_old_one_stopped(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    if state.stage is Stage.REPLACING and not isinstance(event, ev.Restarted):
        effects = tuple(effect for effect in effects if not isinstance(effect, ev.Serve))
    return after, effects


def _replaces_for_ever(state: ModelState, event: ev.Event) -> Step:
    return step(replace(state, replacements=0), event)


def _loads_beside_whatever_there_is_room_for(state: ModelState, event: ev.Event) -> Step:
    return step(state, ev.Warmed(at=event.at) if isinstance(event, ev.NoRoomBeside) else event)


def _stops_what_it_must_compare_with(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.NoRoomBeside | ev.Warmed) and state.target is not None and state.target.shadow:
        lenient = replace(state.target, shadow=replace(state.target.shadow, on_few="go_on"))
        after, effects = step(replace(state, target=lenient), event)
        return replace(after, target=state.target), effects
    return step(state, event)


def _keeps_to_itself_that_nothing_was_compared(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    replaced = state.stage is Stage.REPLACING and isinstance(event, ev.Warmed)
    return (replace(after, shadow=state.shadow) if replaced else after), effects


def _compares_with_what_is_not_there(state: ModelState, event: ev.Event) -> Step:
    if state.stage is Stage.REPLACING and isinstance(event, ev.Warmed):
        return moves.warmed(state, event)
    return step(state, event)


def _skips_the_comparison(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Warmed) and state.target is not None:
        after, effects = step(replace(state, target=replace(state.target, shadow=UNSET)), event)
        return replace(after, target=state.target), effects
    return step(state, event)


def _switches_while_it_compares(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    mirrors = any(isinstance(effect, ev.Mirror) for effect in effects)
    return after, ((ev.Switch(), *effects) if mirrors else effects)


def _installs_what_disagrees(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Shadowed):
        event = replace(event, found=replace(event.found, agreed=event.found.samples))
    return step(state, event)


def _takes_no_requests_for_disagreement(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Shadowed) and state.target is not None and state.target.shadow:
        strict = replace(state.target, shadow=replace(state.target.shadow, on_few="fail"))
        after, effects = step(replace(state, target=strict), event)
        return replace(after, target=state.target), effects
    return step(state, event)


def _takes_no_requests_for_agreement(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Shadowed):
        event = replace(event, found=replace(event.found, samples=10**6, agreed=10**6))
    return step(state, event)


def _believes_a_comparison_of_another_update(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return (replace(after, shadow=state.shadow) if isinstance(event, ev.Ordered) else after), effects


def _answers_everything_at_once(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(ev.Switch() if isinstance(effect, ev.Switch) else effect for effect in effects)


def _keeps_the_first_split(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(effect for effect in effects if not isinstance(effect, ev.Divide))


def _watches_as_long_as_it_was_told_first(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    if isinstance(event, ev.Ordered) and state.stage is after.stage is Stage.PROBATION:
        effects = tuple(effect for effect in effects if not isinstance(effect, ev.Watch))
    return after, effects


MUTANTS: tuple[Machine, ...] = (
    _overwrites_the_installed_slot,
    _trusts_before_probation,
    _commits_at_the_switch,
    _forgets_quarantine,
    _takes_any_order,
    _fetches_wrong_bytes_for_ever,
    _never_strikes,
    _condemns_for_a_broken_network,
    _measures_for_ever,
    _condemns_a_busy_device,
    _gives_up_waiting,
    _serves_nothing_after_a_restart,
    _forgets_what_it_spent,
    _breaks_the_budget_silently,
    _asks_again_at_once,
    _fails_where_it_should_wait,
    _forgets_what_it_refused,
    _leaves_the_old_one_stopped,
    _replaces_for_ever,
    _loads_beside_whatever_there_is_room_for,
    _stops_what_it_must_compare_with,
    _keeps_to_itself_that_nothing_was_compared,
    _compares_with_what_is_not_there,
    _skips_the_comparison,
    _switches_while_it_compares,
    _installs_what_disagrees,
    _takes_no_requests_for_disagreement,
    _takes_no_requests_for_agreement,
    _believes_a_comparison_of_another_update,
    _answers_everything_at_once,
    _keeps_the_first_split,
    _watches_as_long_as_it_was_told_first,
)
