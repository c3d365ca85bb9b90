"""The order of the threads that serve the inference API. With real threads: there is nothing else to it."""

import threading
import time
from collections.abc import Callable

import pytest

from edge_agent.inference.turns import LOOK_S, QUIET_LOOKS_MAX, RUNS_MAX, Turn, Turns

PATIENCE_S = 30.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Waiting:
    """A thread that waits for its turn, and holds it until it is told to go on."""

    def __init__(self, turns: Turns) -> None:
        self.turn: Turn | None = None
        self.go_on = threading.Event()
        self._turns = turns
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.turn = self._turns.take()
        self.go_on.wait()
        self.turn.end()

    def has_it(self) -> bool:
        return self.turn is not None

    def ended(self) -> None:
        self.go_on.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


def test_threads_have_their_turns_one_after_the_other() -> None:
    turns, inside, most = Turns(), [], []

    def work() -> None:
        for _ in range(200):
            turn = turns.take()
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            turn.end()
            turn.end()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(most) == 800
    assert max(most) == 1


def test_a_turn_is_kept_over_a_short_run_that_is_watched_and_over_no_other() -> None:
    turns = Turns()
    turn = turns.take()
    assert not turn.begins(short=True), "nobody watches"
    assert turn.over
    turn = turns.take()
    other = Waiting(turns)
    until(lambda: turns.watched)
    assert turn.begins(short=True)
    turn.ended_run()
    assert not turn.over
    assert not other.has_it()
    assert not turn.begins(short=False)
    until(other.has_it)
    other.ended()


def test_who_always_has_something_to_run_lets_others_read_in_between() -> None:
    turns = Turns()
    turn = turns.take()
    other = Waiting(turns)
    until(lambda: turns.watched)
    for _ in range(2):
        turn.reads()
        for _ in range(RUNS_MAX):
            assert turn.begins(short=True)
            turn.ended_run()
    assert not other.has_it()
    assert not turn.begins(short=True)
    until(other.has_it)
    other.ended()


def test_who_runs_for_too_long_loses_the_turn_and_who_waits_for_requests_does_not() -> None:
    turns = Turns()
    turn = turns.take()
    other = Waiting(turns)
    until(lambda: turns.watched)
    time.sleep(4 * LOOK_S)
    assert not turn.over, "it only waits for requests"
    assert turn.begins(short=True)
    until(other.has_it)
    turn.ended_run()
    assert not turn.begins(short=True), "it has no turn to keep"
    turn.end()
    assert other.turn is not None
    assert not other.turn.over, "the turn that follows is another thread's"
    other.ended()


def test_nobody_watches_when_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.inference.turns.LOOK_S", LOOK_S / 10)
    turns = Turns()
    turn = turns.take()
    others = [Waiting(turns), Waiting(turns)]
    until(lambda: turns.watched)
    until(lambda: not turns.watched)
    assert QUIET_LOOKS_MAX > 1
    assert not turn.begins(short=True)
    until(lambda: any(other.has_it() for other in others))
    for other in others:
        other.go_on.set()
    for other in others:
        other.ended()
