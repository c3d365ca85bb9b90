"""Requests of different lengths as one batch: the pure parts of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact import TensorSpec
from common.artifact.serving import Padding
from common.artifact.tensors import Array
from edge_agent.inference.lengths import LOOK_AGAIN_AFTER, PADDED_TRIALS, Lengths
from edge_agent.inference.scheduling import Ticket, Waiting, WaitingLimits, join, length_class, near, split
from edge_agent.inference.scheduling.padding import STRETCH_MAX, Padder, cut_back, cuts_of

PADDER = Padder({"ids": Padding(1, -1, "mask"), "words": Padding(2, "")})
SPECS = (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1)))
SEEN: dict[str, Padding] = {"ids": Padding(1, 0, "mask")}

lengths = st.integers(1, 200)


def feeds(length: int, rows: int = 2) -> dict[str, Array]:
    return {
        "ids": np.arange(rows * length).reshape(rows, length),
        "mask": np.ones((rows, length), np.int8),
        "words": np.full((rows, 3, length, 2), "w", object),
        "scale": np.ones((rows, 5), np.float32),
    }


@given(lengths, lengths, st.integers(1, 3))
def test_what_is_padded_starts_with_what_was_there_and_goes_on_with_the_filling(
    length: int, more: int, rows: int
) -> None:
    before = feeds(length, rows)
    after = PADDER.padded(before, length + more)
    assert PADDER.length_of(after) == length + more
    assert PADDER.shape_of(after) == PADDER.shape_of(before)
    for name, axis, filling in (("ids", 1, -1), ("mask", 1, 0), ("words", 2, "")):
        kept, filled = np.split(after[name], [length], axis=axis)
        np.testing.assert_array_equal(kept, before[name])
        assert set(filled.flat) == {filling}
        assert after[name].dtype == before[name].dtype
    assert after["scale"] is before["scale"]


def test_inputs_of_different_lengths_have_none() -> None:
    uneven = feeds(3) | {"mask": np.ones((2, 4), np.int8)}
    assert PADDER.length_of(uneven) == 0
    assert PADDER.shape_of(feeds(3)) != PADDER.shape_of(feeds(3) | {"scale": np.ones((2, 6), np.float32)})


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 3))
def test_padding_and_cutting_back_gives_every_request_its_own(wanted: list[int], more: int) -> None:
    longest = max(wanted) + more
    requests = [{"ids": np.random.default_rng(length).integers(0, 9, (1, length))} for length in wanted]
    padder = Padder({"ids": Padding(1, 0)})
    joined = join([padder.padded(one, longest) for one in requests])
    parts = split({"y": joined["ids"] * 2, "total": joined["ids"].sum(axis=1)}, [1] * len(requests))
    assert parts is not None
    for part, request, length in zip(parts, requests, wanted, strict=True):
        own = cut_back(part, {"y": 1, "total": None}, length)
        np.testing.assert_array_equal(own["y"], request["ids"] * 2)
        np.testing.assert_array_equal(own["total"], request["ids"].sum(axis=1))


@pytest.mark.parametrize(
    ("alone", "padded", "cuts"),
    [
        ((1, 5), (1, 7), 1),
        ((1, 3, 5), (1, 3, 7), 2),
        ((1, 3), (1, 3), None),
        ((1,), (1,), None),
        ((1, 4), (1, 6), "refused"),
        ((1, 10), (1, 14), "refused"),
        ((1, 5, 5), (1, 7, 7), "refused"),
        ((1, 5), (1, 5, 1), "refused"),
        ((5, 1), (7, 1), "refused"),
    ],
)
def test_only_an_axis_as_long_as_the_request_is_cut(
    alone: tuple[int, ...], padded: tuple[int, ...], cuts: object
) -> None:
    found = cuts_of({"y": np.zeros(alone)}, {"y": np.zeros(padded)}, 5, 7)
    assert found == (None if cuts == "refused" else {"y": cuts})


def passed(times: int) -> Lengths:
    known = Lengths(SEEN, SPECS, batched=True)
    for _ in range(times):
        assert not known.trusted(["y"])
        assert known.compare({"y": np.ones((1, 4))}, {"y": np.ones((1, 5))}, 4, 5) == ""
        known.tried(["y"], "")
    return known


def test_padding_is_trusted_after_trials_for_the_outputs_that_were_tried() -> None:
    known = passed(PADDED_TRIALS)
    assert (known.trusted(["y"]), known.trusted(["y", "z"])) == (True, False)
    assert known.standing == "used"
    assert passed(PADDED_TRIALS - 1).standing == f"on trial, {PADDED_TRIALS - 1} of {PADDED_TRIALS} passed"


def test_now_and_then_it_is_looked_at_again() -> None:
    known = passed(PADDED_TRIALS)
    assert [known.trusted(["y"]) for _ in range(2 * LOOK_AGAIN_AFTER)].count(False) == 2


@pytest.mark.parametrize(
    ("padded", "said"),
    [
        (np.array([[1.0, 1, 1, 1.1, 1]]), "is answered otherwise when it is padded to 5"),
        (np.ones((1, 6)), "gets outputs of another shape"),
        (np.ones((1, 4)), "gets outputs of another shape"),
    ],
)
def test_one_difference_ends_it_for_good(padded: Array, said: str) -> None:
    known = passed(PADDED_TRIALS)
    difference = known.compare({"y": np.ones((1, 4))}, {"y": padded}, 4, 5)
    assert said in difference
    known.tried(["y"], difference)
    known.tried(["y"], "")
    assert not any(known.trusted(["y"]) for _ in range(5))
    assert known.standing == f"off: {difference}"


def test_a_padding_that_does_not_fit_is_off_from_the_start() -> None:
    assert Lengths({"idz": Padding(1)}, SPECS, batched=True).standing.startswith("off: padding.idz: ")
    assert "first axis" in Lengths(SEEN, SPECS, batched=False).standing
    assert Lengths({}, SPECS, batched=True).standing == ""


@given(lengths, lengths)
def test_near_lengths_are_in_the_same_class_or_the_next(one: int, other: int) -> None:
    if near(one, other):
        assert abs(length_class(one) - length_class(other)) <= 1
    assert near(one, other) == near(other, one) == (max(one, other) <= STRETCH_MAX * min(one, other))
    assert length_class(one) != length_class(0)


def take(waiting: Waiting, rows: int) -> list[int]:
    return [ticket.length for ticket in waiting.take(0.0, lambda _first, _waiting: rows).batch]


@given(st.lists(lengths, min_size=1, max_size=40), st.integers(1, 8), st.integers(100, 3000))
def test_batches_are_of_near_lengths_within_their_bytes_and_the_first_is_never_passed_over(
    wanted: list[int], rows: int, bytes_max: int
) -> None:
    waiting = Waiting(WaitingLimits(100, batch_bytes_max=bytes_max))
    for length in wanted:
        waiting.add(Ticket("", key="k", length=length, size=10 * length))
    left = list(wanted)
    while left:
        batch = take(waiting, rows)
        assert batch[0] == left[0]
        assert all(near(batch[0], length) for length in batch)
        assert len(batch) <= rows
        assert len(batch) == 1 or 10 * len(batch) * max(batch) <= bytes_max
        for length in batch:
            left.remove(length)
    assert len(waiting) == 0


def test_the_nearest_go_first_and_only_as_many_as_there_are_rows() -> None:
    waiting = Waiting(WaitingLimits())
    for length in (100, 120, 99, 500, 100, 81):
        waiting.add(Ticket("", key="k", length=length))
    assert take(waiting, 3) == [100, 100, 99]
    assert take(waiting, 3) == [120]
    assert take(waiting, 3) == [500]


def test_a_batch_of_equal_shapes_is_bounded_in_bytes_too() -> None:
    waiting = Waiting(WaitingLimits(batch_bytes_max=100))
    for size in (40, 50, 20, 10):
        waiting.add(Ticket(size, key="k", size=size))
    assert [ticket.work for ticket in waiting.take(0.0, lambda *_: 9).batch] == [40, 50, 10]
