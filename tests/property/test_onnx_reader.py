"""Whatever a model looks like, the reader agrees with the onnx package; whatever else a file is, it is refused."""

import contextlib

import onnx
from hypothesis import given
from hypothesis import strategies as st

from common.artifact.onnx_io import DATATYPES, read_signature
from common.artifact.source import BytesSource
from common.errors import InvalidInput
from tests.small_models import model_bytes, spec_by_onnx, tensor_value

axes = st.lists(st.one_of(st.integers(0, 2**40), st.sampled_from(["batch", "n"]), st.none()), max_size=5)
tensors = st.builds(tensor_value, st.text(min_size=1, max_size=20), st.sampled_from(sorted(DATATYPES)), axes)
value_lists = st.lists(tensors, min_size=1, max_size=6)
SMALL = model_bytes(inputs=[tensor_value("x", 1, [1, "n"])])


@given(inputs=value_lists, outputs=value_lists)
def test_the_reader_agrees_with_the_onnx_package(
    inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> None:
    signature = read_signature(BytesSource(model_bytes(inputs=inputs, outputs=outputs)))
    assert signature.inputs == tuple(spec_by_onnx(value) for value in inputs)
    assert signature.outputs == tuple(spec_by_onnx(value) for value in outputs)


@given(st.binary(max_size=2000))
def test_garbage_is_refused_with_a_named_error(data: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        read_signature(BytesSource(data))


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_model_is_read_or_refused_and_nothing_else(damage: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for place, byte in damage:
        data[place] = byte
    with contextlib.suppress(InvalidInput):
        read_signature(BytesSource(bytes(data)))
