"""The tensors of model files as the benchmark sees them: by name, with dtype, shape and little-endian bytes.

Reads safetensors by itself and ONNX through the onnx package, so that what it says of our codec's work is independent
of the codec's own parsers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_NAMES = {
    TensorProto.FLOAT: "F32",
    TensorProto.DOUBLE: "F64",
    TensorProto.FLOAT16: "F16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "I8",
    TensorProto.UINT8: "U8",
    TensorProto.INT32: "I32",
    TensorProto.INT64: "I64",
}


class Tensor(NamedTuple):
    """A tensor: its dtype as safetensors names it (`F32`, `BF16`, `I8`, ...), its shape, its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a model file; none for a file that is no model. A `.bin` is described by the `.onnx` beside it."""
    if path.suffix == ".safetensors":
        return of_safetensors(path.read_bytes())
    if path.suffix == ".onnx":
        return dict(_of_onnx(path, with_external=False))
    if path.suffix == ".bin":
        return dict(_of_onnx(path.with_suffix(".onnx"), with_external=True))
    return {}


def of_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file in the order of its header."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data[start + first : start + end])
    return found


def _of_onnx(path: Path, *, with_external: bool) -> Iterator[tuple[str, Tensor]]:
    """The initialisers inside a file, or (`with_external`) those outside it in the `.bin` file of the same name."""
    weights = path.with_suffix(".bin").read_bytes() if with_external else b""
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        outside = {entry.key: entry.value for entry in tensor.external_data}
        if bool(outside) != with_external or tensor.data_type not in _NAMES:
            continue
        first = int(outside.get("offset", 0))
        data = weights[first : first + int(outside["length"])] if outside else _inside(tensor)
        yield tensor.name, Tensor(_NAMES[tensor.data_type], tuple(tensor.dims), data)


def _inside(tensor: TensorProto) -> bytes:
    return np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes()
