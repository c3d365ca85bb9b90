"""Wrong agents, each in one way that a crash shows: the invariants must catch them all, where they say.

A mutant replaces something of the production code for as long as its block runs. `story` and `losses` say where to
look for it; nothing else is known about how it is caught.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

from msgspec.structs import replace

from common import durable
from edge_agent.executor.lane import Lane
from edge_agent.fetch.partial import Partial
from edge_agent.inference.loaded import Loaded
from edge_agent.journal import Journal, LastRun
from edge_agent.slots import Slots
from edge_agent.update import ModelState, Stage, Tally, step
from edge_agent.update import events as ev
from edge_agent.update.outcomes import Step
from tests.crash import invariants
from tests.crash.disk import Loss
from tests.crash.invariants import Invariant

Wrong = Callable[[], contextlib.AbstractContextManager[Any]]

KILLED = (Loss.KILLED,)
POWER = (Loss.ALL, Loss.LATE, Loss.ANY)


class Mutant(NamedTuple):
    """One of `caught_by` must say that something does not hold.

    `at` is in the path of the operation where it crashes, `twice`: its recovery must be crashed too.
    """

    name: str
    wrong: Wrong
    story: str
    losses: tuple[Loss, ...]
    caught_by: tuple[Invariant, ...]
    at: str = ""
    twice: bool = False
    run_s: float = 0.0


def _steps(change: Callable[[ModelState, ev.Event], Step]) -> Wrong:
    return lambda: patch("edge_agent.executor.lane.step", change)


def _does_nothing(*_: object, **__: object) -> None:
    pass


def _does_not_sync_folders() -> contextlib.AbstractContextManager[Any]:
    return patch.object(durable, "fsync_folder", _does_nothing)


@contextlib.contextmanager
def _unsynced(path: Any) -> Iterator[Any]:
    with path.open("wb") as file:
        yield file


def _does_not_sync_new_files() -> contextlib.AbstractContextManager[Any]:
    return patch.object(durable, "new_file", _unsynced)


def _names_downloads_before_they_are_on_the_disk() -> contextlib.AbstractContextManager[Any]:
    return patch.object(durable.GrowingFile, "sync", _does_nothing)


def _builds_over_the_installed_slot() -> contextlib.AbstractContextManager[Any]:
    def slot(state: ModelState) -> str:
        return state.installed.slot if state.installed else "a"

    return patch("edge_agent.update.moves.idle_slot", slot)


def _frees_the_old_slot_before_the_commit(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return (replace(after, installed=after.candidate) if isinstance(event, ev.Switched) else after), effects


def _forgets_that_it_replaces(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    if state.stage is Stage.REPLACING and isinstance(event, ev.Restarted):
        effects = tuple(effect for effect in effects if not isinstance(effect, ev.Serve))
    return after, effects


def _serves_nothing_after_a_restart(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(effect for effect in effects if not isinstance(effect, ev.Serve))


def _does_not_wait_for_the_disk() -> contextlib.AbstractContextManager[Any]:
    begin = Journal.begin_run

    def relaxed(self: Journal, boot: int = 0) -> LastRun:
        self._db.execute("PRAGMA synchronous = OFF")
        return begin(self, boot)

    return patch.object(Journal, "begin_run", relaxed)


@contextlib.contextmanager
def _reports_before_it_saves() -> Iterator[None]:
    save = Lane._save

    async def late(self: Lane, state: ModelState) -> None:
        before, self.state = self.state, state
        self._parts.changed()
        self.state = before
        await save(self, state)

    with patch.object(Lane, "_save", late):
        yield


def _never_strikes() -> contextlib.AbstractContextManager[Any]:
    begin = Journal.begin_run
    return patch.object(Journal, "begin_run", lambda self, boot=0: begin(self, boot)._replace(clean=True))


def _strikes_without_end() -> contextlib.AbstractContextManager[Any]:
    return patch("edge_agent.update.moves.STRIKES_MAX", 1000)


def _saving(change: Callable[[ModelState], ModelState]) -> Wrong:
    save = Journal.save
    return lambda: patch.object(Journal, "save", lambda self, state: save(self, change(state)))


@contextlib.contextmanager
def _follows_any_order() -> Iterator[None]:
    with (
        patch("edge_agent.update.order.is_newer", lambda *_: True),
        patch("edge_agent.journal.is_newer", lambda *_: True),
    ):
        yield


@contextlib.contextmanager
def _never_looks_at_digests() -> Iterator[None]:
    """After a power cut it goes on with what it finds, and believes what it has."""
    with (
        patch("edge_agent.slots.cut_to_flushed", _does_nothing),
        patch("edge_agent.fetch.partial.holding", lambda *_: lambda _path: True),
        patch("edge_agent.slots.holds", lambda path, _: path.exists()),
    ):
        yield


def _resumes_on_rubbish() -> contextlib.AbstractContextManager[Any]:
    return patch("edge_agent.slots.cut_to_flushed", _does_nothing)


def _forgets_downloads() -> contextlib.AbstractContextManager[Any]:
    return patch("edge_agent.executor.executor.wanted_downloads", lambda _: frozenset())


def _begins_downloads_anew() -> contextlib.AbstractContextManager[Any]:
    enter = Partial.__enter__

    def anew(self: Partial) -> Partial:
        self.restart()
        return enter(self)

    return patch.object(Partial, "__enter__", anew)


def _tells_another_end(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Restarted) and state.stage is Stage.IDLE and state.last_update:
        state = replace(state, last_update=replace(state.last_update, outcome="failed"))
    return step(state, event)


def _gives_up_waiting(state: ModelState, event: ev.Event) -> Step:
    after, effects = step(state, event)
    return after, tuple(effect for effect in effects if not isinstance(effect, ev.Wait))


def _fetches_wrong_bytes_too_often() -> contextlib.AbstractContextManager[Any]:
    return patch("edge_agent.update.moves.REDOWNLOADS_MAX", 5)


def _begins_again_at_every_start(state: ModelState, event: ev.Event) -> Step:
    if isinstance(event, ev.Restarted) and state.stage is Stage.IDLE:
        state = replace(state, started_at=event.at, tally=Tally())
    return step(state, event)


def _never_tidies() -> contextlib.AbstractContextManager[Any]:
    return patch.object(Slots, "tidy", _does_nothing)


def _closes_sessions_at_once() -> contextlib.AbstractContextManager[Any]:
    retire = Loaded.retire

    def hurried(self: Loaded) -> Any:
        self._pins = 0
        return retire(self)

    return patch.object(Loaded, "retire", hurried)


_BLOBS = (invariants.blobs_are_absent_or_right,)
_COMPLETE = (invariants.named_releases_are_complete,)
_AGAIN = (invariants.what_is_here_is_not_fetched_again,)
_KEPT = (invariants.success_is_kept,)
_TOLD = (invariants.every_end_is_told_and_only_one,)
_LIVENESS = (invariants.the_story_ends_as_it_does_without_a_crash,)
_STRIKES = (invariants.deaths_over_a_candidate_are_strikes,)

MUTANTS: tuple[Mutant, ...] = (
    Mutant("does not sync folders", _does_not_sync_folders, "first install", POWER, _COMPLETE),
    Mutant("does not sync new files", _does_not_sync_new_files, "patch", POWER, _COMPLETE),
    Mutant("builds over the installed slot", _builds_over_the_installed_slot, "full", KILLED, _COMPLETE),
    Mutant(
        "frees the old slot before the commit",
        _steps(_frees_the_old_slot_before_the_commit),
        "change in probation",
        KILLED,
        (invariants.the_old_release_stays_until_the_commit,),
    ),
    Mutant(
        "serves nothing after a restart",
        _steps(_serves_nothing_after_a_restart),
        "full",
        KILLED,
        (invariants.the_old_or_the_new_serves,),
    ),
    Mutant(
        "forgets that it replaces",
        _steps(_forgets_that_it_replaces),
        "one at a time",
        KILLED,
        (invariants.the_old_or_the_new_serves,),
        at="journal.db-wal",
    ),
    Mutant("does not wait for the disk", _does_not_wait_for_the_disk, "full", POWER, _KEPT),
    Mutant("reports before it saves", _reports_before_it_saves, "full", KILLED, _KEPT, at="journal.db-wal"),
    Mutant("never strikes", _never_strikes, "full", KILLED, _STRIKES),
    Mutant("strikes without end", _strikes_without_end, "change in probation", KILLED, _STRIKES, twice=True),
    Mutant(
        "forgets quarantine",
        _saving(lambda state: replace(state, quarantine=())),
        "rollback",
        KILLED,
        (invariants.quarantined_bytes_are_not_tried_again,),
    ),
    Mutant("follows any order", _follows_any_order, "full", KILLED, (invariants.generations_do_not_decrease,)),
    Mutant(
        "names downloads before they are on the disk",
        _names_downloads_before_they_are_on_the_disk,
        "first install",
        POWER,
        _BLOBS,
    ),
    Mutant("never looks at digests", _never_looks_at_digests, "first install", (Loss.ANY,), _COMPLETE, at=".part"),
    Mutant("resumes on rubbish", _resumes_on_rubbish, "first install", (Loss.ANY,), _AGAIN, at=".part"),
    Mutant("forgets downloads", _forgets_downloads, "first install", KILLED, _AGAIN),
    Mutant("begins downloads anew", _begins_downloads_anew, "first install", KILLED, _AGAIN),
    Mutant(
        "forgets its last words", _saving(lambda state: replace(state, last_update=None)), "full", KILLED, _LIVENESS
    ),
    Mutant("tells another end after a restart", _steps(_tells_another_end), "full", KILLED, _TOLD),
    Mutant(
        "gives up waiting",
        _steps(_gives_up_waiting),
        "full",
        KILLED,
        _LIVENESS,
    ),
    Mutant(
        "fetches wrong bytes too often",
        _fetches_wrong_bytes_too_often,
        "wrong bytes",
        KILLED,
        (invariants.attempts_are_bounded,),
    ),
    Mutant(
        "begins again at every start",
        _steps(_begins_again_at_every_start),
        "full",
        KILLED,
        (invariants.a_second_start_changes_nothing,),
    ),
    Mutant("never tidies", _never_tidies, "full", KILLED, (invariants.nothing_is_left_over,)),
    Mutant(
        "closes sessions at once",
        _closes_sessions_at_once,
        "retire",
        KILLED,
        (invariants.requests_finish_on_their_session,),
        run_s=0.005,
    ),
)
