"""The samples of a self-test as bytes: inputs, and the outputs that belong to them.

The container is safetensors (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header
(little-endian), the header, and then the tensors' bytes one after another without gaps. It has no compression and no
code, so that a length is checked before anything is made of it, and common tools open it. A tensor is called
`SAMPLE/inputs/NAME` or `SAMPLE/outputs/NAME`. Strings, which safetensors lacks, are a `U8` vector in the form of the
Open Inference Protocol V2 (a 4-byte little-endian length and UTF-8 for each element); `__metadata__` holds their shape
as JSON under the tensor's name, and the version of this form under `edgeferry.samples`.

    >>> data = encode_samples([Sample("cat", {"x": np.zeros((1, 2), np.float32)}, {"y": np.ones(1, np.int64)})])
    >>> decode_samples(data)[0].outputs["y"]
    array([1])

Equal samples encode equally. Bytes that are no samples are `IntegrityFailure`; what is read takes no more memory than
the bytes themselves, and twice that where strings or unaligned tensors are copied.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from msgspec import Meta

from common.artifact.selftest import SAMPLES_MAX
from common.artifact.tensors import DTYPES, Array, datatype_of
from common.errors import IntegrityFailure, InvalidInput, TooLarge

SAMPLES_BYTES_MAX = 16 * 1024 * 1024
"""All samples of a self-test together, encoded. A device fetches them whole and holds them in memory for the test."""
HEADER_BYTES_MAX = 1024 * 1024
TENSORS_PER_SAMPLE_MAX = 64
"""Inputs and outputs of one sample together."""
AXES_MAX = 32
AXIS_LENGTH_MAX = 2**31 - 1
SAMPLE_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"

FORMAT_KEY, FORMAT = "edgeferry.samples", "1"
METADATA = "__metadata__"
ALIGNMENT = 8
STORED = {
    "BOOL": "BOOL", "UINT8": "U8", "UINT16": "U16", "UINT32": "U32", "UINT64": "U64", "INT8": "I8", "INT16": "I16",
    "INT32": "I32", "INT64": "I64", "FP16": "F16", "FP32": "F32", "FP64": "F64",
}  # fmt: skip
"""Protocol type to safetensors type."""
_LOADED = {stored: DTYPES[datatype] for datatype, stored in STORED.items()}
_LENGTH = struct.Struct("<I")

Axis = Annotated[int, Meta(ge=0, le=AXIS_LENGTH_MAX)]
Shape = Annotated[tuple[Axis, ...], Meta(max_length=AXES_MAX)]
Place = Annotated[int, Meta(ge=0, le=SAMPLES_BYTES_MAX)]


class Sample(NamedTuple):
    """What goes in, and what must come out: arrays by the name of the tensor."""

    name: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Shape
    data_offsets: tuple[Place, Place]


def encode_samples(samples: Iterable[Sample]) -> bytes:
    """The samples as bytes. `InvalidInput` for what no device could take (`TooLarge`: for what exceeds a limit)."""
    header: dict[str, Any] = {METADATA: {FORMAT_KEY: FORMAT}}
    payload: list[bytes] = []
    place = 0
    for key, array in _tensors(tuple(samples)):
        data, dtype, shape = _stored(key, array)
        if dtype != STORED.get(datatype_of(array)):
            header[METADATA][key] = json.dumps(array.shape, separators=(",", ":"))
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        payload.append(data)
        place += len(data)
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    size = 8 + len(encoded) + place
    if len(encoded) > HEADER_BYTES_MAX or size > SAMPLES_BYTES_MAX:
        fix = f"at most {SAMPLES_BYTES_MAX} bytes: give fewer or smaller samples"
        raise TooLarge(f"they take {size} bytes", field="samples", fix=fix)
    return b"".join((len(encoded).to_bytes(8, "little"), encoded, *payload))


def decode_samples(data: bytes) -> tuple[Sample, ...]:
    """The samples in `data`. `IntegrityFailure` names what is wrong with other bytes."""
    entries, strings, payload = _split(data)
    found: dict[str, Sample] = {}
    position = 0
    for key, entry in entries.items():
        name, tensors, tensor = _placed(found, key)
        start, end = entry.data_offsets
        if start != position or not start <= end <= len(payload):
            _refuse(f"{key[:80]!r} lies at {start} to {end}, expected {position} to at most {len(payload)}")
        position = end
        tensors[tensor] = _array(key, entry, payload[start:end], strings.get(key))
        if len(found[name].inputs) + len(found[name].outputs) > TENSORS_PER_SAMPLE_MAX:
            _refuse(f"{name!r} has more than {TENSORS_PER_SAMPLE_MAX} tensors")
    if position != len(payload):
        _refuse(f"{len(payload) - position} bytes after the last tensor")
    return tuple(found.values())


def _tensors(samples: tuple[Sample, ...]) -> Iterator[tuple[str, Array]]:
    if len(samples) > SAMPLES_MAX:
        raise TooLarge(f"{len(samples)} samples", field="samples", fix=f"give at most {SAMPLES_MAX}")
    if len({sample.name for sample in samples}) != len(samples):
        raise InvalidInput("two samples have one name", field="samples", fix="give each a name of its own")
    for name, inputs, outputs in samples:
        if not re.fullmatch(SAMPLE_NAME, name):
            fix = "use letters, digits and inner '.', '_' or '-', at most 64 characters"
            raise InvalidInput(f"{name[:80]!r} is not allowed as a name", field="samples", fix=fix)
        if len(inputs) + len(outputs) > TENSORS_PER_SAMPLE_MAX:
            fix = f"compare fewer outputs; inputs and outputs are at most {TENSORS_PER_SAMPLE_MAX}"
            raise TooLarge(f"{len(inputs) + len(outputs)} tensors", field=f"samples.{name}", fix=fix)
        yield from ((f"{name}/inputs/{tensor}", inputs[tensor]) for tensor in sorted(inputs))
        yield from ((f"{name}/outputs/{tensor}", outputs[tensor]) for tensor in sorted(outputs))


def _stored(key: str, array: Array) -> tuple[bytes, str, tuple[int, ...]]:
    """Bytes, safetensors type and shape."""
    datatype = datatype_of(array)
    if datatype == "BYTES":
        texts = [str(element).encode() for element in array.flat]
        data = b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
        return data, "U8", (len(data),)
    if datatype not in STORED:
        raise InvalidInput(f"type {datatype}", field=f"samples.{key}", fix=f"use one of {', '.join(DTYPES)}")
    return np.ascontiguousarray(array).tobytes(), STORED[datatype], array.shape


def _split(data: bytes) -> tuple[dict[str, _Entry], dict[str, str], memoryview]:
    """Entries by key, the shapes of those that are strings, and all tensors' bytes."""
    if len(data) > SAMPLES_BYTES_MAX:
        _refuse(f"{len(data)} bytes, the limit is {SAMPLES_BYTES_MAX}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(HEADER_BYTES_MAX, len(data) - 8):
        _refuse("the header is cut off or too long")
    try:
        raw = msgspec.json.decode(data[8 : 8 + length], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop(METADATA, b"{}"), type=dict[str, str])
        if len(raw) > SAMPLES_MAX * TENSORS_PER_SAMPLE_MAX:
            _refuse(f"{len(raw)} tensors")
        entries = {key: msgspec.json.decode(entry, type=_Entry) for key, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityFailure(f"these are no samples: {error}") from error
    if metadata.pop(FORMAT_KEY, None) != FORMAT:
        _refuse(f"__metadata__ does not say {FORMAT_KEY} {FORMAT}")
    return entries, metadata, memoryview(data)[8 + length :]


def _placed(found: dict[str, Sample], key: str) -> tuple[str, dict[str, Array], str]:
    """The sample that the tensor `key` belongs to, its inputs or outputs, and the tensor's name there."""
    name, kind, tensor = [*key.split("/", 2), "", ""][:3]
    if not re.fullmatch(SAMPLE_NAME, name) or kind not in {"inputs", "outputs"} or not tensor:
        _refuse(f"{key[:80]!r} is not SAMPLE/inputs/NAME or SAMPLE/outputs/NAME")
    sample = found.setdefault(name, Sample(name, {}, {}))
    if len(found) > SAMPLES_MAX:
        _refuse(f"more than {SAMPLES_MAX} samples")
    return name, sample.inputs if kind == "inputs" else sample.outputs, tensor


def _array(key: str, entry: _Entry, data: memoryview, strings: str | None) -> Array:
    dtype = _LOADED.get(entry.dtype)
    if dtype is None:
        _refuse(f"{key[:80]!r} has type {entry.dtype[:40]!r}")
    if math.prod(entry.shape) * dtype.itemsize != len(data):
        _refuse(f"{key[:80]!r} has {len(data)} bytes for {entry.dtype} {list(entry.shape)}")
    array: Array = np.frombuffer(data, np.uint8 if dtype.kind == "b" else dtype)
    if dtype.kind == "b":
        if (array > 1).any():
            _refuse(f"{key[:80]!r} holds a BOOL that is neither 0 nor 1")
        array = array.view(np.bool_)
    if strings is not None:
        if entry.dtype != "U8":
            _refuse(f"{key[:80]!r} holds strings as {entry.dtype}")
        return _strings(key, data, strings)
    return _shaped(key, array if array.flags.aligned else array.copy(), entry.shape)


def _strings(key: str, data: memoryview, shape_json: str) -> Array:
    try:
        shape = msgspec.json.decode(shape_json, type=Shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityFailure(f"these are no samples: the shape of {key[:80]!r}: {error}") from error
    texts: list[str] = []
    place = 0
    while place < len(data):
        if place + _LENGTH.size > len(data):
            _refuse(f"{key[:80]!r} is cut off")
        start = place + _LENGTH.size
        place = start + _LENGTH.unpack_from(data, place)[0]
        if place > len(data):
            _refuse(f"{key[:80]!r} is cut off")
        try:
            texts.append(str(data[start:place], "utf-8"))
        except UnicodeDecodeError as error:
            raise IntegrityFailure(f"these are no samples: {key[:80]!r} is not UTF-8") from error
    if len(texts) != math.prod(shape):
        _refuse(f"{key[:80]!r} has {len(texts)} elements for the shape {list(shape)}")
    array = np.empty(len(texts), object)
    array[:] = texts
    return _shaped(key, array, shape)


def _shaped(key: str, array: Array, shape: tuple[int, ...]) -> Array:
    try:
        return array.reshape(shape)
    except ValueError as error:  # an empty tensor can still have axes whose product numpy cannot hold
        raise IntegrityFailure(f"these are no samples: {key[:80]!r} has the shape {list(shape)}") from error


def _refuse(what: str) -> NoReturn:
    raise IntegrityFailure(f"these are no samples: {what}")
