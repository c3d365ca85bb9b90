"""Small ONNX models made on the spot, and the signature that the onnx package finds in them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common.artifact.onnx_io import DATATYPES, OPEN_AXIS
from common.artifact.tensor_spec import TensorSpec

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


def save_with_data(
    folder: Path, *weights: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]", name: str = "model.onnx"
) -> tuple[Path, Path]:
    """A model whose weights the onnx package wrote into a file beside it; both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [numpy_helper.from_array(values, f"w{index}") for index, values in enumerate(weights)]
    model = onnx.load_from_string(model_bytes(initializers=tensors))
    onnx.save_model(model, folder / name, save_as_external_data=True, location=f"{name}.data", size_threshold=0)
    return folder / name, folder / f"{name}.data"


def spec_by_onnx(value: onnx.ValueInfoProto) -> TensorSpec:
    """The same tensor as the onnx package describes it."""
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else OPEN_AXIS for axis in tensor.shape.dim)
    return TensorSpec(value.name, DATATYPES[tensor.elem_type], shape)
