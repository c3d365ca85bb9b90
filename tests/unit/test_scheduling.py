"""Which request runs next and how many go together: the pure decisions, without a thread."""

import numpy as np
import pytest

from common.artifact import TensorSpec
from edge_agent.inference.scheduling import (
    CostCurve,
    Ticket,
    Waiting,
    WaitingFull,
    WaitingLimits,
    agree,
    has_rows,
    join,
    row_count,
    split,
)
from edge_agent.inference.scheduling.curve import LOOK_AGAIN_AFTER, OBSERVATIONS_MAX, OBSERVATIONS_MIN, SIZES

MANY = 1000


def seconds_of(rows: int, *, fixed: float, each: float) -> float:
    return fixed + each * rows


def trained(cost: dict[int, float], batches: int = 100) -> CostCurve:
    """A curve that has run `batches` with always enough waiting; `cost` in seconds by rows."""
    curve = CostCurve()
    for _ in range(batches):
        rows = curve.next_rows(MANY)
        curve.observe(rows, cost[rows])
    return curve


def test_a_model_that_gains_from_batches_gets_the_largest() -> None:
    curve = trained({size: seconds_of(size, fixed=0.004, each=0.001) for size in SIZES})
    assert curve.best == SIZES[-1]
    assert curve.next_rows(MANY) == SIZES[-1]
    assert curve.next_rows(5) == 5


def test_a_model_that_loses_runs_rows_alone() -> None:
    curve = trained({size: 0.001 * size**1.2 for size in SIZES})
    assert curve.best == 1
    assert curve.next_rows(MANY) == 1


def test_a_model_that_loses_beyond_four_rows_stays_at_four() -> None:
    cost = {1: 0.010, 2: 0.016, 4: 0.028, 8: 0.090, 16: 0.200, 32: 0.500, 64: 1.0}
    seen: list[int] = []
    curve = CostCurve()
    for _ in range(60):
        seen.append(curve.next_rows(MANY))
        curve.observe(seen[-1], cost[seen[-1]])
    assert curve.best == 4
    assert max(seen) == 16, "two sizes that lose end the climb"
    assert seen.count(8) + seen.count(16) == 2 * OBSERVATIONS_MIN


def test_a_gain_too_small_to_wait_for_is_none() -> None:
    assert trained({size: 0.010 * size * (0.99 if size > 1 else 1) for size in SIZES}).best == 1


def test_sizes_are_tried_only_when_so_many_wait() -> None:
    curve = CostCurve()
    for _ in range(50):
        rows = curve.next_rows(2)
        assert rows <= 2
        curve.observe(rows, seconds_of(rows, fixed=0.004, each=0.001))
    assert curve.best == 2
    assert curve.next_rows(4) == 4, "the next size, once there are enough"


def test_one_disturbed_batch_changes_nothing() -> None:
    curve = trained({size: seconds_of(size, fixed=0.004, each=0.001) for size in SIZES})
    curve.observe(SIZES[-1], 10.0)
    assert curve.best == SIZES[-1]


def test_a_machine_that_changes_is_learned_anew() -> None:
    curve = trained({size: seconds_of(size, fixed=0.004, each=0.001) for size in SIZES})
    for _ in range(LOOK_AGAIN_AFTER * OBSERVATIONS_MAX * len(SIZES)):
        rows = curve.next_rows(MANY)
        curve.observe(rows, 0.001 * rows**1.3)
    assert curve.best == 1


def test_rows_are_never_more_than_wait_or_than_allowed() -> None:
    curve = CostCurve(rows_max=8)
    for _ in range(200):
        rows = curve.next_rows(MANY)
        assert 1 <= rows <= 8
        curve.observe(rows, seconds_of(rows, fixed=0.004, each=0.0001))
    assert curve.best == 8


def test_the_time_of_a_batch_is_estimated_from_the_best_size() -> None:
    curve = CostCurve()
    assert curve.seconds(4) is None
    curve.observe(1, 0.5)
    assert curve.seconds(4) == pytest.approx(2.0)


def take(waiting: Waiting, rows: int = 1, now: float = 0.0) -> tuple[list[str], list[str]]:
    taken = waiting.take(now, lambda _first, _waiting: rows)
    return [ticket.work for ticket in taken.batch], [ticket.work for ticket in taken.late]


def queue(*tickets: Ticket, requests_max: int = 9, bytes_max: int = 900) -> Waiting:
    waiting = Waiting(WaitingLimits(requests_max, bytes_max))
    for ticket in tickets:
        waiting.add(ticket)
    return waiting


def test_the_most_urgent_comes_first_and_among_equals_the_oldest() -> None:
    waiting = queue(Ticket("a"), Ticket("b", priority=1), Ticket("c"), Ticket("d", priority=1), Ticket("e", priority=9))
    assert [take(waiting)[0] for _ in range(5)] == [["b"], ["d"], ["a"], ["c"], ["e"]]
    assert take(waiting) == ([], [])


def test_a_batch_takes_its_like_from_all_priorities_and_leaves_the_others() -> None:
    waiting = queue(
        Ticket("a", key="k"), Ticket("b", key="other"), Ticket("c", key="k", priority=9), Ticket("d", key="k")
    )
    assert take(waiting, rows=3) == (["a", "d", "c"], [])
    assert take(waiting, rows=3) == (["b"], [])


def test_a_batch_has_no_more_rows_than_it_should_and_divides_nobody() -> None:
    waiting = queue(*(Ticket(name, key="k", rows=rows) for name, rows in (("a", 3), ("b", 4), ("c", 1), ("d", 9))))
    assert take(waiting, rows=4) == (["a", "c"], [])
    assert take(waiting, rows=4) == (["b"], [])
    assert take(waiting, rows=4) == (["d"], []), "the first one runs, however large"


def test_tickets_without_a_key_run_alone() -> None:
    waiting = queue(Ticket("a"), Ticket("b"))
    assert take(waiting, rows=9) == (["a"], [])


def test_who_is_late_is_never_run() -> None:
    waiting = queue(Ticket("a", deadline=5.0, key="k"), Ticket("b", deadline=7.0, key="k"), Ticket("c", key="k"))
    assert take(waiting, rows=1, now=5.0) == (["b"], ["a"])
    assert take(waiting, rows=9, now=99.0) == (["c"], [])


def test_a_full_queue_refuses_unless_somebody_less_urgent_waits() -> None:
    waiting = queue(Ticket("a"), Ticket("b", priority=9), requests_max=2)
    with pytest.raises(WaitingFull):
        waiting.add(Ticket("c", priority=9))
    assert [ticket.work for ticket in waiting.add(Ticket("d"))] == ["b"]
    with pytest.raises(WaitingFull):
        waiting.add(Ticket("e"))
    assert [ticket.work for ticket in waiting.clear()] == ["a", "d"]


def test_bytes_are_bounded_too_and_nobody_is_sent_away_in_vain() -> None:
    waiting = queue(Ticket("a", size=600), Ticket("b", size=200, priority=9))
    with pytest.raises(WaitingFull):
        waiting.add(Ticket("c", size=400))
    assert len(waiting) == 2, "making b go would not have been enough"
    assert waiting.add(Ticket("d", size=100)) == []


def test_cores_that_are_free_need_no_room() -> None:
    waiting = queue(requests_max=1)
    waiting.add(Ticket("a"), free=1)
    waiting.add(Ticket("b"), free=1)
    with pytest.raises(WaitingFull):
        waiting.add(Ticket("c"), free=1)


def test_who_gives_up_leaves_the_queue() -> None:
    ticket = Ticket("a", size=900)
    waiting = queue(ticket)
    assert waiting.remove(ticket)
    assert not waiting.remove(ticket)
    waiting.add(Ticket("b", size=900))


def test_only_open_first_axes_everywhere_make_rows() -> None:
    def spec(*shape: int) -> TensorSpec:
        return TensorSpec("t", "FP32", shape)

    assert has_rows([spec(-1, 4)], [spec(-1)])
    assert not has_rows([spec(-1, 4), spec(2, -1)], [spec(-1)])
    assert not has_rows([spec(-1, 4)], [spec(1)])
    assert not has_rows([spec(-1)], [spec()])


def test_rows_go_in_and_come_out_in_order() -> None:
    one, two = {"x": np.ones((2, 3))}, {"x": np.full((1, 3), 5.0)}
    assert row_count(one) == 2
    assert row_count({"x": np.ones((2, 3)), "y": np.ones(3)}) is None
    joined = join([one, two])
    parts = split({"y": joined["x"].sum(axis=1)}, [2, 1])
    assert parts is not None
    assert [part["y"].tolist() for part in parts] == [[3.0, 3.0], [15.0]]
    assert split({"y": np.ones(2)}, [2, 1]) is None


def test_answers_agree_but_for_rounding() -> None:
    answer = {"y": np.array([1.0, 1e-9, -500.0], np.float32), "label": np.array(["a", "b", "c"], object)}
    near = {**answer, "y": answer["y"] * np.float32(1 + 1e-4) + np.float32(1e-5)}
    far = {**answer, "y": answer["y"] + np.float32(0.2)}
    assert agree(answer, near)
    assert not agree(answer, far)
    assert not agree(answer, {**answer, "label": np.array(["a", "b", "d"], object)})
    assert not agree(answer, {"y": answer["y"]})
    assert not agree({"n": np.array([1, 2])}, {"n": np.array([1, 3])})
