"""Inputs and outputs are checked in quick ways that find what the slow ones find."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact import TensorSpec
from common.artifact.tensors import DTYPES, Array, Expected, check_feeds
from common.errors import InvalidInput
from edge_agent.inference.tensors import non_finite

kinds = st.sampled_from(["FP32", "INT64", "BOOL"])
axes = st.lists(st.integers(-1, 3), max_size=3).map(tuple)
specs = st.lists(st.tuples(kinds, axes), min_size=1, max_size=3).map(
    lambda pairs: tuple(TensorSpec(name, kind, shape) for name, (kind, shape) in zip("abc", pairs, strict=False))
)


def refusal(check: object) -> str:
    try:
        check()  # type: ignore[operator]
    except InvalidInput as error:
        return str(error)
    return ""


@given(specs, st.data())
def test_prepared_declarations_refuse_what_the_declarations_do(
    declared: tuple[TensorSpec, ...], data: st.DataObject
) -> None:
    feeds: dict[str, Array] = {}
    for spec in declared:
        open_axis = data.draw(st.integers(0, 2))
        shape = tuple(open_axis if axis < 0 else axis for axis in spec.shape)
        change = data.draw(st.sampled_from(["", "", "", "type", "shape", "rank", "name", "missing"]))
        kind = "UINT8" if change == "type" else spec.datatype
        shape = tuple(axis + 1 for axis in shape) if change == "shape" else (*shape, 1) if change == "rank" else shape
        if change != "missing":
            feeds["other" if change == "name" else spec.name] = np.zeros(shape, DTYPES[kind])
    assert refusal(lambda: Expected(declared).check(feeds)) == refusal(lambda: check_feeds(declared, feeds))


@pytest.mark.parametrize("size", [0, 1, 3, 5000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_bad_number_is_found_and_large_ones_are_not_bad(dtype: type[np.floating[Any]], size: int) -> None:
    largest = np.full((size, 1), np.finfo(dtype).max, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert non_finite({"a": np.ones(2, np.int64), "y": largest, "z": largest[::-1]}) is None
        for bad in (np.nan, np.inf, -np.inf):
            if size:
                spoiled = np.ones((size, 1), dtype)
                spoiled[size // 2] = bad
                assert non_finite({"x": largest, "y": spoiled}) == "y"
