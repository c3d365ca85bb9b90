"""Inference bodies: what goes in comes out, and no bytes at all make the codec do anything but answer or refuse."""

import contextlib
import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.artifact.tensors import DTYPES, Array
from common.errors import InvalidInput
from edge_agent.inference.protocol import InferRequest, decode_request, encode_response

NUMERIC = sorted(DTYPES.keys() - {"BYTES"})
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, Array]:
    """A datatype and an array of it, finite."""
    datatype, shape = draw(st.sampled_from([*NUMERIC, "BYTES"])), draw(SHAPES)
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, object)
        array[:] = draw(st.lists(st.text(max_size=5), min_size=count, max_size=count))
        return datatype, array.reshape(shape)
    dtype = DTYPES[datatype]
    raw = np.frombuffer(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)), dtype)
    if dtype.kind == "b":
        raw = raw.view(np.uint8) % 2 == 1
    return datatype, np.nan_to_num(raw).reshape(shape) if dtype.kind == "f" else raw.reshape(shape)


def ask(datatype: str, shape: Any, data: Any) -> Array:
    document = {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]}
    return decode_request(json.dumps(document).encode(), None).feeds["x"]


def binary(datatype: str, shape: list[int], data: bytes, size: object = None) -> Array:
    size = len(data) if size is None else size
    tensor = {"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [tensor]}).encode()
    return decode_request(header + data, len(header)).feeds["x"]


@given(arrays(), st.booleans(), st.booleans())
def test_an_answer_read_back_as_a_request_is_the_same_array(
    typed: tuple[str, Array], as_binary: bool, padded: bool
) -> None:
    datatype, array = typed
    wish = InferRequest("p" if padded else "", {}, None, frozenset(), as_binary)
    body = encode_response("m", "1", wish, {"x": array})
    answer = json.loads(body.data[: body.header_length])
    assert answer["model_version"] == "1"
    assert answer["outputs"][0]["datatype"] == datatype
    header = json.dumps({"inputs": answer["outputs"]}).encode()
    payload = b"" if body.header_length is None else body.data[body.header_length :]
    found = decode_request(header + payload, len(header) if as_binary else None).feeds["x"]
    assert found.dtype == DTYPES[datatype]
    assert found.flags.aligned
    assert found.shape == array.shape
    assert found.tolist() == array.tolist()


@given(st.binary(max_size=300), st.none() | st.integers(-5, 400))
@example(b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1e999]}]}', None)
@example(b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP16", "data": [1e300]}]}', None)
@example(b'{"inputs": [{"name": "x", "shape": [2147483647, 2147483647, 9], "datatype": "FP32", "data": [1]}]}', None)
@example(b'{"inputs": [{"name": "x", "shape": [0, 2147483647, 2147483647, 9], "datatype": "FP32", "data": []}]}', None)
def test_any_bytes_are_answered_or_refused(body: bytes, length: int | None) -> None:
    with contextlib.suppress(InvalidInput):
        decode_request(body, length)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@given(st.sampled_from([*NUMERIC, "BYTES", "BF16"]), st.lists(st.integers(-1, 3), max_size=3), JSON_VALUES, JSON_VALUES)
def test_any_json_values_are_answered_or_refused(datatype: str, shape: list[int], data: Any, size: Any) -> None:
    tensor = {"name": "x", "shape": shape, "datatype": datatype, "data": data, "parameters": {"binary_data_size": size}}
    header = msgspec.json.encode({"inputs": [tensor]})
    try:
        array = decode_request(header + b"\1\0\0\0", len(header)).feeds["x"]
    except InvalidInput:
        return
    assert array.shape == tuple(shape)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT32", [1.0]),
        ("INT32", [True]),
        ("INT32", [2**31]),
        ("UINT8", [-1]),
        ("INT64", [2**63]),
        ("UINT64", [2**64]),
        ("UINT64", [1.5]),
        ("FP32", [True]),
        ("FP32", [1e39]),
        ("FP16", [70_000]),
        ("FP32", [None]),
        ("FP32", ["1"]),
        ("BOOL", [1]),
        ("BYTES", [1]),
        ("BYTES", [["a"], 1]),
        ("FP32", [[1], [2, 3]]),
        ("FP32", 1),
    ],
)
def test_json_numbers_are_never_converted_silently(datatype: str, data: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        ask(datatype, [1], data)
    assert caught.value.field == "inputs.x"
    assert caught.value.fix


def test_integers_on_both_sides_of_the_signed_range_stay_exact() -> None:
    assert ask("UINT64", [2], [1, 2**64 - 1]).tolist() == [1, 2**64 - 1]
    assert ask("INT64", [2], [-(2**63), 2**63 - 1]).tolist() == [-(2**63), 2**63 - 1]
    assert ask("FP32", [2], [1, 2]).tolist() == [1.0, 2.0]


def test_nested_and_flat_data_are_the_same() -> None:
    assert ask("INT8", [2, 2], [[1, 2], [3, 4]]).tolist() == ask("INT8", [2, 2], [1, 2, 3, 4]).tolist()
    assert ask("BYTES", [2, 1], [["a"], ["b"]]).tolist() == ask("BYTES", [2, 1], ["a", "b"]).tolist()


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "size", "words"),
    [
        ("FP32", [2], b"\0" * 7, None, "7 bytes for FP32"),
        ("FP32", [2], b"\0" * 8, 12, "12 bytes announced, 8 are left"),
        ("FP32", [1], b"\0" * 8, 4, "4 bytes after the last"),
        ("FP32", [1], b"\0" * 4, -4, "not a length"),
        ("FP32", [1], b"\0" * 4, "4", "not a length"),
        ("BYTES", [1], struct.pack("<I", 9) + b"abc", None, "element 0 is cut off"),
        ("BYTES", [1], b"\1\0", None, "a length is cut off"),
        ("BYTES", [1], struct.pack("<I", 1) + b"\xff", None, "element 0 is not UTF-8"),
        ("BYTES", [2], struct.pack("<I", 1) + b"a", None, "1 elements"),
        ("BYTES", [0], struct.pack("<I", 1) + b"a", None, "more than 0 elements"),
    ],
)
def test_binary_data_that_is_not_what_it_claims_is_refused(
    datatype: str, shape: list[int], data: bytes, size: object, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        binary(datatype, shape, data, size)


def test_an_input_sent_twice_is_refused() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "INT8", "data": [1]}
    with pytest.raises(InvalidInput, match="twice"):
        decode_request(json.dumps({"inputs": [tensor, tensor]}).encode(), None)


@pytest.mark.parametrize(
    ("parameters", "outputs", "expected"),
    [
        ({}, [], {"y": False, "z": False}),
        ({"binary_data_output": True}, [], {"y": True, "z": True}),
        ({}, [{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}], {"y": True, "z": False}),
        (
            {"binary_data_output": True},
            [{"name": "y", "parameters": {"binary_data": False}}, {"name": "z"}],
            {"y": False, "z": True},
        ),
    ],
)
def test_each_output_comes_as_it_was_asked_for(
    parameters: dict[str, Any], outputs: list[dict[str, Any]], expected: dict[str, bool]
) -> None:
    request = decode_request(json.dumps({"inputs": [], "outputs": outputs, "parameters": parameters}).encode(), None)
    body = encode_response("m", "1", request, {"y": np.zeros(2, np.float32), "z": np.zeros(3, np.int64)})
    found = json.loads(body.data[: body.header_length])["outputs"]
    assert {one["name"]: "data" not in one for one in found} == expected
