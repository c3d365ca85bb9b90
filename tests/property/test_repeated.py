"""Heads that are remembered change nothing: requests and answers are what `protocol` makes of them."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact.tensors import DTYPES, Array
from common.errors import InvalidInput
from common.ids import ModelName, Version
from edge_agent.inference.protocol import decode_request, encode_response
from edge_agent.inference.repeated import HEADS_MAX, Repeated

NAMES = ("a", "b", "c")


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, Array]:
    datatype = draw(st.sampled_from(["FP32", "INT64", "UINT8", "BOOL", "FP16"]))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape)) * DTYPES[datatype].itemsize
    data = draw(st.binary(min_size=size, max_size=size)) if datatype != "BOOL" else bytes(size)
    array = np.frombuffer(data, DTYPES[datatype]).reshape(shape)
    return datatype, np.nan_to_num(array, posinf=0.0, neginf=0.0) if array.dtype.kind == "f" else array


def body_of(arrays: list[tuple[str, Array]], padding: int, parameters: dict[str, Any]) -> tuple[bytes, int]:
    inputs = [
        {"name": name, "shape": array.shape, "datatype": kind, "parameters": {"binary_data_size": array.nbytes}}
        for name, (kind, array) in zip(NAMES, arrays, strict=False)
    ]
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode() + b" " * padding
    return head + b"".join(array.tobytes() for _, array in arrays), len(head)


@given(st.lists(tensors(), min_size=1, max_size=3), st.integers(0, 7), st.booleans(), st.integers(0, 9))
def test_a_known_head_is_read_as_an_unknown_one(
    arrays: list[tuple[str, Array]], padding: int, binary: bool, priority: int
) -> None:
    body, length = body_of(arrays, padding, {"binary_data_output": binary, "priority": priority})
    repeated, plain = Repeated(), decode_request(body, length)
    for _ in range(3):
        found = repeated.decode(body, length)
        assert found._replace(feeds={}) == plain._replace(feeds={})
        assert list(found.feeds) == list(plain.feeds)
        for name, array in found.feeds.items():
            assert (array.dtype, array.shape, array.tobytes()) == (
                plain.feeds[name].dtype,
                plain.feeds[name].shape,
                plain.feeds[name].tobytes(),
            )
            assert array.flags.aligned
        model, version = ModelName("m"), Version("1")
        assert repeated.encode(model, version, found, found.feeds) == encode_response(
            model, version, plain, plain.feeds
        )


def test_a_known_head_with_another_body_is_read_anew() -> None:
    repeated = Repeated()
    body, length = body_of([("FP32", np.ones(2, np.float32))], 0, {})
    assert repeated.decode(body, length).feeds["a"].tolist() == [1, 1]
    other = body[:length] + np.full(2, 7, np.float32).tobytes()
    assert repeated.decode(other, length).feeds["a"].tolist() == [7, 7]
    for wrong in (body[:-1], body + b"x", body[:length]):
        with pytest.raises(InvalidInput):
            repeated.decode(wrong, length)
    with pytest.raises(InvalidInput):
        repeated.decode(body, length + len(body))


def test_answers_of_other_releases_shapes_and_ids_do_not_mix() -> None:
    repeated = Repeated()
    body, length = body_of([("FP32", np.ones(2, np.float32))], 0, {"binary_data_output": True})
    request = repeated.decode(body, length)
    for version, shape in (("1", (2,)), ("2", (2,)), ("1", (1, 2)), ("1", (2,))):
        outputs = {"y": np.ones(shape, np.float32)}
        found = repeated.encode(ModelName("m"), Version(version), request, outputs)
        header = json.loads(found.data[: found.header_length])
        assert (header["model_version"], tuple(header["outputs"][0]["shape"])) == (version, shape)
    named = request._replace(id="r-1")
    assert json.loads(repeated.encode(ModelName("m"), Version("1"), named, outputs).data[:-8])["id"] == "r-1"


def test_what_is_remembered_is_bounded() -> None:
    repeated = Repeated()
    for padding in range(2 * HEADS_MAX + 3):
        body, length = body_of([("UINT8", np.ones(1, np.uint8))], padding, {})
        repeated.decode(body, length)
    assert 0 < len(repeated._plans) <= HEADS_MAX
