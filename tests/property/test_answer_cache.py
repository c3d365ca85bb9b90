"""Answers kept for equal requests: only equal ones get them, memory is bounded, and the newest stay."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.inference.caching import ENTRY_BYTES, SHARE_MAX, Answers, Question, frozen

OWNERS = ("one", "two", "three")
OWNER_BYTES, ALL_BYTES = 20 * ENTRY_BYTES, 40 * ENTRY_BYTES
FLOATS = np.array([0.0, -0.0, np.nan, 1.0], np.float32)


def question(number: int, length: int = 1) -> Question:
    return Question({"x": np.full(length, number, np.int64)}, ["y"])


def answer(number: int, size: int = 0) -> dict[str, Any]:
    return frozen({"y": np.full(size + 1, number, np.uint8)})


gets = st.tuples(st.just("get"), st.sampled_from(OWNERS), st.integers(0, 30), st.just(0))
puts = st.tuples(st.just("put"), st.sampled_from(OWNERS), st.integers(0, 30), st.integers(0, 6 * ENTRY_BYTES))
forgets = st.tuples(st.just("forget"), st.sampled_from(OWNERS), st.just(0), st.just(0))


@settings(max_examples=200)
@given(st.lists(puts | gets | puts | gets | forgets, max_size=120))
def test_an_owner_gets_its_own_last_answer_and_memory_stays_within_both_bounds(
    steps: list[tuple[str, str, int, int]],
) -> None:
    answers = Answers(ALL_BYTES)
    given: dict[tuple[str, int], int] = {}
    for at, (what, owner, number, size) in enumerate(steps):
        if what == "forget":
            answers.forget(owner)
            assert answers.held(owner) == (0, 0)
            given = {key: value for key, value in given.items() if key[0] != owner}
        elif what == "put":
            kept = answers.put(owner, question(number), answer(at % 256, size), OWNER_BYTES)
            assert kept == (ENTRY_BYTES + 8 + size + 1 <= OWNER_BYTES // SHARE_MAX)
            if kept:
                given[owner, number] = at % 256
                assert answers.get(owner, question(number)) is not None, "the newest is there"
        found = answers.get(owner, question(number)) if what == "get" else None
        if found is not None:
            assert found["y"][0] == given[owner, number]
        held = [answers.held(one) for one in OWNERS]
        assert sum(size for _, size in held) == answers.size <= ALL_BYTES
        assert max(size for _, size in held) <= OWNER_BYTES


def test_the_least_recently_used_goes_first_its_own_owners_before_anybody_elses() -> None:
    answers = Answers(100 * ENTRY_BYTES)
    answers.put("other", question(0), answer(0), 100 * ENTRY_BYTES)
    for number in range(6):
        answers.put("one", question(number), answer(number), 5 * ENTRY_BYTES)
        assert answers.get("one", question(0)), "used each time, so never the oldest"
    assert answers.get("one", question(1)) is None
    assert [number for number in range(6) if answers.get("one", question(number))] == [0, 3, 4, 5]
    assert answers.get("other", question(0))


def test_when_all_together_are_too_much_the_oldest_of_all_owners_goes() -> None:
    answers = Answers(5 * ENTRY_BYTES)
    for number, owner in enumerate(("one", "two", "one", "two", "two")):
        answers.put(owner, question(number), answer(number), 5 * ENTRY_BYTES)
    assert [answers.get(owner, question(number)) is None for owner, number in (("one", 0), ("two", 1))] == [True, False]


def test_an_answer_that_would_push_out_all_others_is_not_kept() -> None:
    answers = Answers(100 * ENTRY_BYTES)
    answers.put("one", question(1), answer(1), 8 * ENTRY_BYTES)
    assert not answers.put("one", question(2), answer(2, 2 * ENTRY_BYTES), 8 * ENTRY_BYTES)
    assert not answers.put("one", question(3, ENTRY_BYTES), answer(3), 8 * ENTRY_BYTES)
    assert answers.get("one", question(1))


@pytest.mark.parametrize("number", [np.float32, np.int16, np.float64])
def test_a_question_equals_itself_in_other_memory(number: type) -> None:
    values: Any = np.arange(24).reshape(4, 6).astype(number)
    one = Question({"a": values, "b": values.T}, ["y", "z"])
    same = Question({"b": np.asfortranarray(values.T), "a": np.ascontiguousarray(values)}, ["y", "z"])
    assert (one, one.digest, one.size) == (same, same.digest, 2 * values.nbytes)
    np.testing.assert_array_equal(one.feeds["b"], values.T)


@pytest.mark.parametrize(
    ("feeds", "outputs"),
    [
        ({"x": FLOATS}, ["z"]),
        ({"x": FLOATS}, ["y", "z"]),
        ({"w": FLOATS}, ["y"]),
        ({"x": FLOATS.reshape(2, 2)}, ["y"]),
        ({"x": FLOATS.view(np.int32)}, ["y"]),
        ({"x": FLOATS * np.array([-1, 1, 1, 1], np.float32)}, ["y"]),
        ({"x": FLOATS, "w": FLOATS}, ["y"]),
    ],
)
def test_whatever_else_is_asked_is_another_question(feeds: dict[str, Any], outputs: list[str]) -> None:
    one = Question({"x": FLOATS}, ["y"])
    assert one == Question({"x": FLOATS.copy()}, ["y"]), "the same NaN equals itself"
    assert one != Question(feeds, outputs)


def test_strings_are_compared_with_their_borders() -> None:
    texts = [Question({"x": np.array(words, object)}, ["y"]) for words in (["ab", "c"], ["a", "bc"], ["ab", "ç"])]
    assert len({one.digest for one in texts}) == 3
    assert texts[0] != texts[1]
    assert texts[0] == Question({"x": np.array(["ab", "c"], object)}, ["y"])


class Colliding(Question):
    """A question whose hash is everybody's."""

    __slots__ = ()

    def __init__(self, number: int) -> None:
        super().__init__({"x": np.full(1, number, np.int64)}, ["y"])
        self.digest = 7


def test_equal_hashes_are_not_enough() -> None:
    answers = Answers(100 * ENTRY_BYTES)
    answers.put("one", Colliding(1), answer(1), 50 * ENTRY_BYTES)
    assert answers.get("one", Colliding(2)) is None
    answers.put("one", Colliding(2), answer(2), 50 * ENTRY_BYTES)
    assert answers.get("one", Colliding(1)) is None
    assert answers.held("one")[0] == 1


def test_a_question_keeps_what_was_asked_and_frozen_outputs_keep_what_was_answered() -> None:
    asked, batch = np.zeros(3, np.float32), np.arange(12.0).reshape(4, 3)
    one, kept = Question({"x": asked}, ["y"]), frozen({"y": batch[1:2]})
    asked[:] = 5
    batch[:] = 5
    assert one.feeds["x"].tolist() == [0, 0, 0]
    assert kept["y"].tolist() == [[3, 4, 5]]
    assert kept["y"].base is None, "not the whole batch"
    for array in (one.feeds["x"], kept["y"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
