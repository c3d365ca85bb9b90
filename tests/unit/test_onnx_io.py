"""The signature of a model is read from its structure, and what cannot be served is refused with the way out."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from common.artifact.onnx_io import DATATYPES, TENSORS_MAX, OnnxSignature, read_signature
from common.artifact.source import BytesSource
from common.artifact.tensor_spec import TensorSpec
from common.errors import InvalidInput
from tests.small_models import model_bytes, spec_by_onnx, tensor_value


def test_a_real_models_signature_is_what_the_onnx_package_says(real_models: tuple[Path, Path]) -> None:
    for path in real_models:
        model = onnx.load(path)
        signature = read_signature(BytesSource(path.read_bytes()))
        assert signature.inputs == tuple(spec_by_onnx(value) for value in model.graph.input)
        assert signature.outputs == tuple(spec_by_onnx(value) for value in model.graph.output)
        assert signature.opset == next(opset.version for opset in model.opset_import if opset.domain == "")
        assert (signature.ir_version, signature.producer) == (model.ir_version, model.producer_name)


def test_weights_are_skipped_not_read() -> None:
    weights = numpy_helper.from_array(np.ones(4_000_000, np.float32), "w")
    source = CountingSource(model_bytes(inputs=[tensor_value("x", TensorProto.FLOAT, [1])], initializers=[weights]))
    read_signature(source)
    assert source.read < 300_000 < source.size


def test_an_initializer_that_is_also_an_input_is_a_default_not_an_input() -> None:
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    inputs = [tensor_value("x", TensorProto.FLOAT, [1, 3]), tensor_value("w", TensorProto.FLOAT, [3])]
    signature = read(model_bytes(inputs=inputs, initializers=[weight], ir_version=3))
    assert [tensor.name for tensor in signature.inputs] == ["x"]


def test_a_sparse_initializer_that_is_also_an_input_is_a_default() -> None:
    model = onnx.load_from_string(
        model_bytes(inputs=[tensor_value("x", TensorProto.FLOAT, [1]), tensor_value("s", 1, [3])])
    )
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    assert [tensor.name for tensor in read(model.SerializeToString()).inputs] == ["x"]


@pytest.mark.parametrize(("element_type", "datatype"), DATATYPES.items())
def test_element_types_get_their_protocol_names(element_type: int, datatype: str) -> None:
    signature = read(model_bytes(inputs=[tensor_value("x", element_type, [2, None, "batch", 0])]))
    assert signature.inputs == (TensorSpec("x", datatype, (2, -1, -1, 0)),)


def test_a_scalar_has_an_empty_shape() -> None:
    assert read(model_bytes(inputs=[tensor_value("x", TensorProto.INT64, [])])).inputs[0].shape == ()


def test_the_default_operator_set_goes_by_either_of_its_names() -> None:
    opsets = [helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("ai.onnx", 17)]
    assert read(model_bytes(opsets=opsets)).opset == 17
    assert read(model_bytes(opsets=opsets[:1])).opset == 0


def test_a_graph_in_two_parts_is_merged_as_protobuf_says() -> None:
    first = model_bytes(inputs=[tensor_value("x", TensorProto.FLOAT, [1])])
    second = onnx.ModelProto(
        graph=onnx.GraphProto(input=[tensor_value("y", TensorProto.FLOAT, [2])])
    ).SerializeToString()
    assert [tensor.name for tensor in read(first + second).inputs] == ["x", "y"]


def test_fields_that_nobody_knows_are_stepped_over() -> None:
    model = model_bytes(inputs=[tensor_value("x", TensorProto.FLOAT, [1])])
    fixed64, fixed32, varint, text = (
        b"\xa1\x06" + b"\xff" * 8,
        b"\xa5\x06" + b"\xff" * 4,
        b"\xa0\x06\x01",
        b"\xa2\x06\x02hi",
    )
    assert read(fixed64 + model + fixed32 + varint + text) == read(model)


def test_a_part_that_reaches_out_of_the_part_it_lies_in_is_refused() -> None:
    graph = b"\x12\x05abc"
    error = refusal(b"\x3a" + bytes([len(graph)]) + graph + model_bytes())
    assert "should reach to byte 9, but ends at byte 7" in error.message


@pytest.mark.parametrize(
    "data", [b"", b"not a model at all", b"\0" * 100, b"\xff" * 100, b"PK\x03\x04" + bytes(50), b"<html>no</html>"]
)
def test_other_files_are_refused(data: bytes) -> None:
    error = refusal(data)
    assert error.field == "model"
    assert error.fix


def test_every_truncation_of_a_small_model_is_refused_or_still_whole() -> None:
    data = model_bytes(inputs=[tensor_value("x", TensorProto.FLOAT, [1, "n"])])
    whole = read(data)
    for length in range(len(data)):
        try:
            signature = read(data[:length])
        except InvalidInput:
            continue
        # A cut between two top-level fields leaves a valid, shorter message: it may only lack what comes last.
        assert signature.outputs == whole.outputs


def test_a_truncated_real_model_is_refused(real_models: tuple[Path, Path]) -> None:
    data = real_models[0].read_bytes()
    for length in (100, 50_000, len(data) // 2, len(data) - 1):
        assert "ends at byte" in refusal(data[:length]).message


def test_an_output_that_is_not_a_tensor_is_refused_by_name() -> None:
    sequence = helper.make_tensor_sequence_value_info("probabilities", TensorProto.FLOAT, None)
    error = refusal(model_bytes(outputs=[sequence]))
    assert "output 'probabilities' is not a tensor" in error.message
    assert "zipmap" in str(error.fix)


def test_an_input_without_a_shape_is_refused_by_name() -> None:
    assert "input 'x' has no shape" in refusal(model_bytes(inputs=[tensor_value("x", TensorProto.FLOAT, None)])).message


def test_an_element_type_that_no_device_serves_is_refused() -> None:
    assert "element type 14" in refusal(model_bytes(inputs=[tensor_value("x", TensorProto.COMPLEX64, [1])])).message


def test_too_many_inputs_are_refused() -> None:
    inputs = [tensor_value(f"x{n}", TensorProto.FLOAT, [1]) for n in range(TENSORS_MAX + 1)]
    assert "more than 256 inputs" in refusal(model_bytes(inputs=inputs)).message


@pytest.mark.parametrize("missing", ["ir_version", "opset_import"])
def test_a_model_that_lacks_what_onnx_demands_is_refused(missing: str) -> None:
    model = onnx.load_from_string(model_bytes())
    model.ClearField(missing)
    assert "it has no" in refusal(model.SerializeToString()).message


class CountingSource(BytesSource):
    """Counts the bytes that are asked for."""

    read = 0

    def read_at(self, offset: int, length: int) -> bytes:
        data = super().read_at(offset, length)
        self.read += len(data)
        return data


def read(data: bytes) -> OnnxSignature:
    return read_signature(BytesSource(data))


def refusal(data: bytes) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        read(data)
    return caught.value
