"""Answers keep a rule exactly when numpy says so, and a difference names the place that is farthest off."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.artifact import TensorSpec
from common.artifact.answers import check_samples, differs, first_difference
from common.artifact.samples import Sample
from common.artifact.selftest import Close, Exact, Rule, SelfTest, Top1
from common.artifact.tensors import Array
from common.errors import InvalidInput

FLOATS: list[type[np.generic]] = [np.float16, np.float32, np.float64]
NUMBERS: list[type[np.generic]] = [*FLOATS, np.int8, np.uint8, np.int64, np.uint64]
BOUNDS = st.sampled_from([0.0, 1e-7, 1e-3, 0.5, 3.0])


@st.composite
def pairs(draw: st.DrawFn, kinds: list[type[np.generic]] = NUMBERS, min_dims: int = 0) -> tuple[Array, Array]:
    """Two arrays of one type and shape; the first is finite, the second near to it in places."""
    dtype = np.dtype(draw(st.sampled_from(kinds)))
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=3, max_side=4))
    finite = hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False) if dtype.kind == "f" else None
    expected = draw(hnp.arrays(dtype, shape, elements=finite))
    other = draw(hnp.arrays(dtype, shape))
    take = draw(hnp.arrays(np.bool_, shape))
    return expected, np.where(take, other, expected)


@given(pairs(), BOUNDS, BOUNDS)
@example((np.array([1.0]), np.array([np.nan])), 1.0, 1.0)
@example((np.array([1.0]), np.array([np.inf])), 1.0, 1.0)
@example((np.array([1e308]), np.array([np.inf])), 3.0, 0.0)
@example((np.array([6e4], np.float16), np.array([-6e4], np.float16)), 0.0, 3.0)
@example((np.array([-128], np.int8), np.array([127], np.int8)), 0.0, 3.0)
@example((np.array(1.0), np.array(1.5)), 0.0, 0.5)
def test_close_is_what_numpy_calls_close(pair: tuple[Array, Array], rtol: float, atol: float) -> None:
    expected, found = pair
    with np.errstate(over="ignore", invalid="ignore"):
        wanted, got = (array.astype(np.float64) for array in pair)
        good = bool(np.allclose(got, wanted, rtol=rtol, atol=atol) and np.isfinite(got).all())
    assert (differs(Close(rtol, atol), expected, found) is None) == good


@given(pairs())
def test_exact_is_equal(pair: tuple[Array, Array]) -> None:
    assert (differs(Exact(), *pair) is None) == np.array_equal(*pair)


@given(pairs(min_dims=1))
def test_top1_is_a_shared_largest_element_in_every_row(pair: tuple[Array, Array]) -> None:
    expected, found = (array.reshape(-1, array.shape[-1]).tolist() for array in pair)

    def tops(row: list[float]) -> set[int]:
        return {at for at, value in enumerate(row) if value == max(row)} if np.isfinite(row).all() else set()

    good = all(tops(wanted) & tops(got) for wanted, got in zip(expected, found, strict=True))
    assert (differs(Top1(), *pair) is None) == good


def test_a_tie_that_is_broken_another_way_is_still_the_same_answer() -> None:
    assert differs(Top1(), np.array([1, 3, 3]), np.array([1, 2, 3])) is None
    assert differs(Top1(), np.array([[1, 3, 2]]), np.array([[3, 1, 2]])) is not None


@given(pairs(FLOATS))
def test_a_difference_names_the_largest_deviation_and_the_tolerance(pair: tuple[Array, Array]) -> None:
    expected, found = pair
    words = differs(Close(rtol=0.0, atol=0.25), expected, found)
    if words is None:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    largest = off[np.isnan(off)][0] if np.isnan(off).any() else off.max()
    assert f"off by {largest:g}, allowed is 0.25 + 0 * |expected|" in words
    place = tuple(int(axis) for axis in re.findall(r"\d+", words[words.index("[") : words.index("]")]))
    assert f"{found[place]!s} instead of {expected[place]!s}" in words


def test_strings_are_equal_or_not() -> None:
    expected = np.array([["cat", "dog"]], object)
    assert differs(Exact(), expected, expected.copy()) is None
    words = differs(Exact(), expected, np.array([["cat", "x" * 1000]], object))
    assert words is not None
    assert "1 of 2 values differ, first at [0, 1]" in words
    assert len(words) < 200


def test_another_shape_or_type_is_a_difference_whatever_the_rule() -> None:
    expected = np.zeros((1, 2), np.float32)
    for found in (np.zeros((2, 1), np.float32), np.zeros((1, 2), np.float64)):
        for rule in (Exact(), Close(1.0, 1.0), Top1()):
            assert "instead of FP32 [1, 2]" in str(differs(rule, expected, found))


INPUTS = (TensorSpec("x", "FP32", (-1, 2)),)
OUTPUTS = (TensorSpec("y", "FP32", (-1,)), TensorSpec("z", "BYTES", (1,)))
SAMPLE = Sample("cat", {"x": np.zeros((1, 2), np.float32)}, {"y": np.ones(1, np.float32)})


def check(*samples: Sample, count: int = 1, rules: dict[str, Rule] | None = None) -> None:
    test = SelfTest(samples="s", count=count, rules=rules or {"y": Exact()})
    check_samples(samples, test, INPUTS, OUTPUTS)


def test_samples_that_fit_the_model_are_taken_and_the_first_difference_is_named() -> None:
    check(SAMPLE)
    assert first_difference({"y": Exact()}, SAMPLE, SAMPLE.outputs) is None
    words = first_difference({"y": Exact()}, SAMPLE, {"y": np.zeros(1, np.float32)})
    assert words == "sample 'cat': output 'y': 1 of 1 values differ, first at [0]: 0.0 instead of 1.0"
    assert "there is no output 'y'" in str(first_difference({"y": Exact()}, SAMPLE, {}))


@pytest.mark.parametrize(
    ("field", "sample", "rules"),
    [
        ("samples.cat.inputs.x", SAMPLE._replace(inputs={}), {}),
        ("samples.cat.inputs.x", SAMPLE._replace(inputs={"x": np.zeros((1, 3), np.float32)}), {}),
        ("samples.cat.inputs.v", SAMPLE._replace(inputs={**SAMPLE.inputs, "v": np.zeros(1)}), {}),
        ("samples.cat.outputs", SAMPLE._replace(outputs={}), {}),
        ("samples.cat.outputs.y", SAMPLE._replace(outputs={"y": np.ones(1)}), {}),
        ("samples.cat.outputs.y", SAMPLE._replace(outputs={"y": np.full(1, np.nan, np.float32)}), {}),
        ("samples.cat.outputs.y", SAMPLE._replace(outputs={"y": np.ones(0, np.float32)}), {"y": Top1()}),
        ("rules.v", SAMPLE, {"v": Exact()}),
        ("rules.z", SAMPLE, {"z": Close(0.1, 0.1)}),
    ],
)
def test_samples_that_do_not_fit_are_refused_by_name(field: str, sample: Sample, rules: dict[str, Rule]) -> None:
    with pytest.raises(InvalidInput) as refused:
        check(sample, rules=rules)
    assert refused.value.field == field


def test_as_many_samples_come_as_were_announced() -> None:
    with pytest.raises(InvalidInput, match="1 samples, 2 were announced"):
        check(SAMPLE, count=2)
