"""Inference requests and responses as bytes: Open Inference Protocol V2 over HTTP, with the binary tensor extension.

A body is a JSON header, and after it the raw little-endian bytes of the tensors that the header marks with
`binary_data_size`, in their order. The HTTP header `Inference-Header-Content-Length` says where the JSON ends; without
it the body is all JSON. `BYTES` elements travel as a 4-byte length and UTF-8. The model's declared inputs are not known
here: this module only makes sure that a tensor is what its own header says.

Sources: KServe, "Open Inference Protocol V2" (rest_predict_v2); Triton, "Binary Tensor Data Extension" and "Schedule
Policy Extension" (`priority`, `timeout`).
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET, Meta

from common.artifact.tensors import DTYPES, Array, datatype_of
from common.errors import InvalidInput
from edge_agent.inference.scheduling import PRIORITY_MAX

TENSORS_MAX = 256
AXES_MAX = 32
AXIS_LENGTH_MAX = 2**31 - 1
TIMEOUT_US_MAX = 3600 * 1_000_000
"""Microseconds, as in Triton's `timeout` parameter."""

_AS_THEY_ARE = frozenset(DTYPES.values()) - {np.dtype(np.object_)}
_LENGTH = struct.Struct("<I")
_FLOAT_KINDS, _INT_KINDS = "fiu", "iu"

Axis = Annotated[int, Meta(ge=0, le=AXIS_LENGTH_MAX)]


class InputTensor(msgspec.Struct, frozen=True):
    """One input as the header has it."""

    name: str
    shape: Annotated[tuple[Axis, ...], Meta(max_length=AXES_MAX)]
    datatype: str
    data: Any = UNSET
    parameters: dict[str, Any] = {}


class WantedOutput(msgspec.Struct, frozen=True):
    """One output that the caller asks for."""

    name: str
    parameters: dict[str, Any] = {}


class RequestHeader(msgspec.Struct, frozen=True):
    """The JSON part of a request."""

    inputs: Annotated[tuple[InputTensor, ...], Meta(max_length=TENSORS_MAX)]
    id: str = ""
    outputs: Annotated[tuple[WantedOutput, ...], Meta(max_length=TENSORS_MAX)] = ()
    parameters: dict[str, Any] = {}


class InferRequest(NamedTuple):
    """A request, parsed. `outputs` is None when the caller wants all of them; `binary` names those wanted as bytes.

    `priority` is 1 (first) to 9, 0 for the default; `timeout_s` is how long the request may wait to be started;
    `parameters` are all that the header has.
    """

    id: str
    feeds: dict[str, Array]
    outputs: list[str] | None
    binary: frozenset[str]
    binary_by_default: bool
    priority: int = 0
    timeout_s: float | None = None
    parameters: Mapping[str, Any] = {}


class Body(NamedTuple):
    """A response body; `header_length` is the length of its JSON part, or None when it is all JSON."""

    data: bytes
    header_length: int | None


_HEADERS = msgspec.json.Decoder(RequestHeader)


def decode_request(body: bytes, header_length: int | None) -> InferRequest:
    """The request in `body`, whose JSON part is `header_length` bytes long (None: all of it).

    Numeric arrays may be read-only views of `body`. Raises `InvalidInput` that names the tensor.
    """
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        message = f"{length} bytes of JSON announced in a body of {len(body)}"
        raise InvalidInput(message, field="Inference-Header-Content-Length", fix="send the length of the JSON part")
    try:
        header = _HEADERS.decode(memoryview(body)[:length])
    except (msgspec.DecodeError, RecursionError) as error:  # the second for lists nested without end
        raise InvalidInput(f"not an inference request: {error}", fix=_shape_of_a_request(header_length)) from error
    _refuse_unsupported(header)
    feeds = _decode_inputs(header.inputs, memoryview(body)[length:])
    by_default = header.parameters.get("binary_data_output") is True
    names = [output.name for output in header.outputs]
    binary = frozenset(o.name for o in header.outputs if o.parameters.get("binary_data", by_default) is True)
    priority, timeout_us = _number(header, "priority", PRIORITY_MAX), _number(header, "timeout", TIMEOUT_US_MAX)
    timeout_s = timeout_us / 1e6 or None
    return InferRequest(header.id, feeds, names or None, binary, by_default, priority, timeout_s, header.parameters)


def encode_response(model: str, version: str, request: InferRequest, outputs: dict[str, Array]) -> Body:
    """The response to `request`, with each output as JSON or as bytes, as the caller wished.

    Raises `InvalidInput` when an output wanted as JSON holds a NaN or an infinity, which JSON cannot say.
    """
    described: list[dict[str, Any]] = []
    payload: list[bytes] = []
    for name, array in outputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": array.shape}
        binary = name in request.binary if request.outputs else request.binary_by_default
        if binary:
            data = as_bytes(array)
            tensor["parameters"] = {"binary_data_size": len(data)}
            payload.append(data)
        else:
            tensor["data"] = _to_json(name, array)
        described.append(tensor)
    header: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id:
        header["id"] = request.id
    encoded = msgspec.json.encode(header)
    return Body(b"".join([encoded, *payload]), len(encoded)) if payload else Body(encoded, None)


def _shape_of_a_request(header_length: int | None) -> str:
    if header_length is None:
        return "send JSON, or set Inference-Header-Content-Length for binary tensors"
    return 'send {"inputs": [{"name", "shape", "datatype", "data"}]}'


def _number(header: RequestHeader, name: str, maximum: int) -> int:
    value = header.parameters.get(name, 0)
    if type(value) is not int or not 0 <= value <= maximum:
        raise InvalidInput(f"{value!r:.40} is not 0 to {maximum}", field=f"parameters.{name}", fix="send an integer")
    return value


def _refuse_unsupported(header: RequestHeader) -> None:
    """Refuse what would change the answer if it were ignored."""
    if header.parameters.get("sequence_id"):
        raise InvalidInput("sequences are not supported", field="parameters.sequence_id", fix="leave it out")
    for where, tensors in (("inputs", header.inputs), ("outputs", header.outputs)):
        for tensor in tensors:
            for name in ("shared_memory_region", "classification"):
                if name in tensor.parameters:
                    field = f"{where}.{tensor.name}.parameters.{name}"
                    raise InvalidInput("not supported", field=field, fix="send and take tensors in the body")


def _decode_inputs(inputs: Sequence[InputTensor], payload: memoryview) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    offset = 0
    for tensor in inputs:
        field = f"inputs.{tensor.name}"
        if tensor.name in feeds:
            raise InvalidInput("this input is there twice", field=field, fix="send it once")
        if tensor.datatype not in DTYPES:
            known = f"use one of {', '.join(DTYPES)}"
            raise InvalidInput(f"unknown datatype {tensor.datatype[:40]!r}", field=field, fix=known)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            feeds[tensor.name] = _from_json(tensor, field)
        else:
            chunk = _take(payload, offset, size, field)
            offset += len(chunk)
            feeds[tensor.name] = _from_bytes(tensor, chunk, field)
    if offset != len(payload):
        message = f"{len(payload) - offset} bytes after the last binary tensor"
        raise InvalidInput(message, field="body", fix="make every binary_data_size match what is sent")
    return feeds


def _take(payload: memoryview, offset: int, size: object, field: str) -> memoryview:
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise InvalidInput("not a length in bytes", field=f"{field}.parameters.binary_data_size", fix="send an integer")
    if size > len(payload) - offset:
        message = f"{size} bytes announced, {len(payload) - offset} are left in the body"
        raise InvalidInput(message, field=field, fix="make binary_data_size match what is sent")
    return payload[offset : offset + size]


def _from_bytes(tensor: InputTensor, data: memoryview, field: str) -> Array:
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        return _shaped(_strings(data, count, field), tensor, field)
    dtype = DTYPES[tensor.datatype]
    if len(data) != count * dtype.itemsize:
        message = f"{len(data)} bytes for {tensor.datatype} {list(tensor.shape)}"
        raise InvalidInput(message, field=field, fix=f"send {count * dtype.itemsize} bytes")
    array = np.frombuffer(data, dtype)
    # The JSON part has any length, so the tensor may begin anywhere; engines read aligned memory.
    return _shaped(array if array.flags.aligned else array.copy(), tensor, field)


def _strings(data: memoryview, count: int, field: str) -> Array:
    """`count` elements, each a little-endian 4-byte length and UTF-8."""
    elements: list[str] = []
    offset = 0
    while offset < len(data):
        if len(elements) == count:
            raise InvalidInput(f"more than {count} elements", field=field, fix="send as many as the shape says")
        if len(data) - offset < _LENGTH.size:
            raise InvalidInput("a length is cut off", field=field, fix="send 4 bytes of length before each element")
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        if length > len(data) - offset:
            raise InvalidInput(f"element {len(elements)} is cut off", field=field, fix="send all of its bytes")
        elements.append(_text(data[offset : offset + length], len(elements), field))
        offset += length
    if len(elements) != count:
        raise InvalidInput(f"{len(elements)} elements", field=field, fix=f"send {count}, as the shape says")
    return _object_array(elements)


def _text(data: memoryview, index: int, field: str) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"element {index} is not UTF-8", field=field, fix="send text as UTF-8") from error


def _from_json(tensor: InputTensor, field: str) -> Array:
    """The array in `data`, nested or flat (row-major), without any silent conversion."""
    if tensor.data is UNSET:
        raise InvalidInput("no data", field=field, fix='send "data", or binary data with binary_data_size')
    if not isinstance(tensor.data, list):
        raise InvalidInput("data is not a list", field=field, fix="send a list, nested or flat in row-major order")
    if tensor.datatype == "BYTES":
        return _shaped(_json_strings(tensor.data, field), tensor, field)
    # UINT64 goes through objects: numpy makes floats of integers on both sides of 2**63.
    carrier = np.dtype(np.object_) if tensor.datatype == "UINT64" else None
    try:
        raw = np.asarray(tensor.data, carrier)
    except ValueError as error:
        raise InvalidInput("rows of different lengths", field=field, fix=f"send {_wanted(tensor)}") from error
    return _shaped(_as_declared(raw, tensor, field), tensor, field)


def _as_declared(raw: Array, tensor: InputTensor, field: str) -> Array:
    """JSON numbers as the declared type; `InvalidInput` if that would change a value's kind or overflow."""
    dtype = DTYPES[tensor.datatype]
    if raw.size == 0:
        return np.zeros(0, dtype)
    wrong = InvalidInput(f"data is not all {tensor.datatype}", field=field, fix=f"send {_wanted(tensor)}")
    if raw.dtype == np.object_:
        if not all(type(value) is int for value in raw.flat):
            raise wrong
    elif raw.dtype.kind not in {"b": "b", "f": _FLOAT_KINDS}.get(dtype.kind, _INT_KINDS):
        raise wrong
    if dtype.kind in _INT_KINDS:
        limits = np.iinfo(dtype.name)
        if raw.min() < limits.min or raw.max() > limits.max:
            message = f"a value is outside {limits.min} to {limits.max}"
            raise InvalidInput(message, field=field, fix=f"send {_wanted(tensor)}")
    with np.errstate(over="ignore"):
        array = raw.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"a value is too large for {tensor.datatype}", field=field, fix="send smaller values")
    return array


def _json_strings(data: list[Any], field: str) -> Array:
    elements: list[str] = []
    left: list[Any] = [data]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left.extend(reversed(item))
        elif isinstance(item, str):
            elements.append(item)
        else:
            raise InvalidInput("data is not all strings", field=field, fix="send JSON strings")
    return _object_array(elements)


def _object_array(elements: list[str]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def _shaped(array: Array, tensor: InputTensor, field: str) -> Array:
    if array.size != math.prod(tensor.shape):
        raise InvalidInput(f"{array.size} elements", field=field, fix=f"send {_wanted(tensor)}")
    try:
        return array.reshape(tensor.shape)
    except ValueError as error:  # an empty tensor can still have axes whose product numpy cannot hold
        raise InvalidInput(f"shape {list(tensor.shape)} is too large", field=field, fix="send a shorter one") from error


def _wanted(tensor: InputTensor) -> str:
    count = math.prod(tensor.shape)
    return f"{count} elements of {tensor.datatype} for the shape {list(tensor.shape)}"


def as_bytes(array: Array) -> bytes:
    """The elements as the protocol carries them, little-endian or as strings with their lengths."""
    if array.dtype in _AS_THEY_ARE:
        return array.tobytes()
    if array.dtype != np.object_:
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    encoded = [str(element).encode() for element in array.flat]
    return b"".join(part for text in encoded for part in (_LENGTH.pack(len(text)), text))


def _to_json(name: str, array: Array) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        message = "the answer holds a NaN or an infinity, which JSON cannot carry"
        raise InvalidInput(message, field=f"outputs.{name}", fix='ask for it with "binary_data": true')
    flat: list[Any] = array.ravel().tolist()
    return flat
