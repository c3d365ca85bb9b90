"""Small ONNX models made on the spot, and the signature that the onnx package finds in them."""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from common.artifact.manifest import TensorSpec
from common.artifact.onnx_io import DATATYPES, OPEN_AXIS

Axes = Sequence[int | str | None] | None


def tensor_value(name: str, element_type: int, shape: Axes) -> onnx.ValueInfoProto:
    """An input or output; None for `shape` leaves it out, None for an axis leaves it open."""
    return helper.make_tensor_value_info(name, element_type, shape)


def model_bytes(
    *,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    initializers: Sequence[onnx.TensorProto] = (),
    opsets: Sequence[onnx.OperatorSetIdProto] = (),
    ir_version: int = 10,
) -> bytes:
    """A serialised model around one Identity node (whether it would run does not matter to who reads signatures)."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "small",
        list(inputs) or [tensor_value("x", TensorProto.FLOAT, [1])],
        list(outputs) or [tensor_value("y", TensorProto.FLOAT, [1])],
        list(initializers),
    )
    opset_imports = list(opsets) or [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset_imports, producer_name="tests", ir_version=ir_version)
    data: bytes = model.SerializeToString()
    return data


def spec_by_onnx(value: onnx.ValueInfoProto) -> TensorSpec:
    """The same tensor as the onnx package describes it."""
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else OPEN_AXIS for axis in tensor.shape.dim)
    return TensorSpec(value.name, DATATYPES[tensor.elem_type], shape)
