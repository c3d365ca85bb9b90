"""Where in a model file the weights lie: name, element type, shape and place of each tensor, without reading them.

Understands ONNX (initializers, constants in nodes, sub-graphs and functions; payloads of `raw_data` and of the packed
`float_data` and `double_data`, which are the same bytes), data files that an ONNX model refers to (external data), and
safetensors. Any other file has no weights that are known here; that is not an error, and neither is a damaged model:
whoever asks only wants to do better than treating the file as bytes.

Sources: onnx/onnx.proto (TensorProto, AttributeProto, FunctionProto) and docs/ExternalData.md of the ONNX project;
the safetensors format, https://huggingface.co/docs/safetensors.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from common.artifact.protobuf import LEN, Field, Malformed, Span, WireReader
from common.artifact.source import ByteSource

WEIGHTS_MAX = 200_000
NAME_BYTES_MAX = 1024
DEPTH_MAX = 16
"""Graphs in graphs."""
RANK_MAX = 32
"""Axes. The product of a million of them, which a header of a few megabytes can name, would take minutes."""
SAFETENSORS_HEADER_BYTES_MAX = 64 * 1024 * 1024

ONNX_TYPES = {
    1: "F32", 2: "I8", 3: "I8", 4: "I16", 5: "I16", 6: "I32", 7: "I64", 9: "I8", 10: "F16", 11: "F64", 12: "I32",
    13: "I64", 14: "F32", 15: "F64", 16: "BF16", 17: "I8", 18: "I8", 19: "I8", 20: "I8", 21: "I4", 22: "I4", 23: "I4",
}  # fmt: skip
"""TensorProto.DataType to element type. Unsigned and boolean types go by width, a complex number is two floats."""
SAFETENSORS_TYPES = {
    "BOOL": "I8", "U8": "I8", "I8": "I8", "F8_E5M2": "I8", "F8_E4M3": "I8", "I16": "I16", "U16": "I16", "I32": "I32",
    "U32": "I32", "I64": "I64", "U64": "I64", "F16": "F16", "BF16": "BF16", "F32": "F32", "F64": "F64",
}  # fmt: skip
ELEMENT_BITS = {"I4": 4, "I8": 8, "I16": 16, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "I64": 64, "F64": 64}


class Weight(NamedTuple):
    """One tensor: `kind` is its element type (a key of `ELEMENT_BITS`), `span` its payload in the file, little-endian,
    as many bytes as its elements need.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    span: Span


class _ExternalTensor(NamedTuple):
    """A tensor whose payload is in the file `location`."""

    location: str
    weight: Weight


class _SafetensorsEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def weights(source: ByteSource) -> tuple[Weight, ...]:
    """The tensors in a model file, in file order, none overlapping another; empty when it is of no kind known here."""
    try:
        found: Iterable[Weight] = _safetensors(source)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        found = _onnx(source)[0]
    return _in_order(found, source.size)


def external_weights(model: ByteSource, location: str, size: int) -> tuple[Weight, ...]:
    """The tensors that the ONNX model `model` keeps in its data file `location`, which has `size` bytes."""
    return _in_order((each.weight for each in _onnx(model)[1] if each.location == location), size)


def _in_order(found: Iterable[Weight], size: int) -> tuple[Weight, ...]:
    """Those that are where they say they are. Two tensors may share their bytes; the first one stands for both."""
    kept: list[Weight] = []
    for weight in sorted(found, key=lambda each: each.span):
        start, end = weight.span
        fits = 0 <= start < end <= size and (end - start) * 8 == _bits(weight)
        if fits and (not kept or start >= kept[-1].span.end):
            kept.append(weight)
    return tuple(kept)


def _bits(weight: Weight) -> int:
    bits = math.prod(weight.shape) * ELEMENT_BITS[weight.kind]
    return (bits + 7) // 8 * 8


def _safetensors(source: ByteSource) -> Iterable[Weight]:
    head = source.read_at(0, 9)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:] != b"{" or length > min(SAFETENSORS_HEADER_BYTES_MAX, source.size - 8):
        raise ValueError("not a safetensors file")
    entries = msgspec.json.decode(source.read_at(8, length), type=dict[str, msgspec.Raw])
    entries.pop("__metadata__", None)
    return [_safetensors_weight(name, raw, 8 + length) for name, raw in entries.items()][:WEIGHTS_MAX]


def _safetensors_weight(name: str, raw: msgspec.Raw, data: int) -> Weight:
    entry = msgspec.json.decode(raw, type=_SafetensorsEntry)
    start, end = entry.data_offsets
    span = Span(data + start, data + end)
    if entry.dtype not in SAFETENSORS_TYPES or len(entry.shape) > RANK_MAX:
        return Weight(name, "I8", (end - start,), span)
    return Weight(name, SAFETENSORS_TYPES[entry.dtype], tuple(entry.shape), span)


def _onnx(source: ByteSource) -> tuple[list[Weight], list[_ExternalTensor]]:
    walk = _OnnxWalk(WireReader(source))
    try:
        walk.model(walk.reader.whole)
    except Malformed:
        return [], []
    return walk.inside, walk.outside


class _OnnxWalk:
    """Collects tensors wherever ONNX may keep them. Fields that are not looked into are skipped, not read."""

    def __init__(self, reader: WireReader) -> None:
        self.reader = reader
        self.inside: list[Weight] = []
        self.outside: list[_ExternalTensor] = []

    def model(self, span: Span) -> None:
        for part in self._messages(span, {7, 20, 25}):
            if part.number == 7:
                self._graph(part.span, DEPTH_MAX)
            elif part.number == 20:  # training information: two graphs
                for graph in self._messages(part.span, {1, 2}):
                    self._graph(graph.span, DEPTH_MAX)
            else:
                for node in self._messages(part.span, {7}):
                    self._node(node.span, DEPTH_MAX)

    def _graph(self, span: Span, depth: int) -> None:
        if depth == 0:
            raise Malformed(f"more than {DEPTH_MAX} graphs in each other")
        for part in self._messages(span, {1, 5, 15}):
            if part.number == 1:
                self._node(part.span, depth)
            elif part.number == 5:
                self._tensor(part.span, "")
            else:
                self._sparse(part.span)

    def _node(self, span: Span, depth: int) -> None:
        """A constant has no name of its own; it goes by the name of the node's output."""
        output = ""
        for part in self._messages(span, {2, 5}):
            if part.number == 2:
                output = output or self.reader.text(part.span, NAME_BYTES_MAX)
            else:
                self._attribute(part.span, output, depth)

    def _attribute(self, span: Span, output: str, depth: int) -> None:
        for part in self._messages(span, {5, 6, 10, 11, 22, 23}):
            if part.number in {5, 10}:
                self._tensor(part.span, output)
            elif part.number in {6, 11}:
                self._graph(part.span, depth - 1)
            else:
                self._sparse(part.span)

    def _sparse(self, span: Span) -> None:
        for part in self._messages(span, {1, 2}):
            self._tensor(part.span, "")

    def _tensor(self, span: Span, name: str) -> None:
        shape: list[int] = []
        kind, payload = 0, None
        entries: dict[str, str] = {}
        for part in self.reader.fields(span):
            match part:
                case Field(number=1, wire_type=0, value=value) if len(shape) < RANK_MAX:
                    shape.append(value)
                case Field(number=1, wire_type=2) if len(shape) < RANK_MAX:
                    shape += self.reader.varints(part.span, RANK_MAX)
                case Field(number=2, wire_type=0, value=value):
                    kind = value
                case Field(number=8, wire_type=2):
                    name = self.reader.text(part.span, NAME_BYTES_MAX)
                case Field(number=4 | 9 | 10, wire_type=2):
                    payload = part.span
                case Field(number=13, wire_type=2):
                    entries.update(self._entry(part.span))
        if kind in ONNX_TYPES and len(self.inside) + len(self.outside) < WEIGHTS_MAX:
            self._keep(name, kind, shape, payload, entries)

    def _keep(self, name: str, kind: int, shape: list[int], payload: Span | None, entries: dict[str, str]) -> None:
        if kind in {14, 15}:
            shape = [*shape, 2]
        weight = Weight(name, ONNX_TYPES[kind], tuple(shape), payload or Span(0, 0))
        if payload is not None:
            self.inside.append(weight)
        elif "location" in entries:
            start, length = (_number(entries.get(key, "0")) for key in ("offset", "length"))
            length = length or _bits(weight) // 8
            placed = weight._replace(span=Span(start, start + length))
            self.outside.append(_ExternalTensor(entries["location"].removeprefix("./"), placed))

    def _entry(self, span: Span) -> Iterator[tuple[str, str]]:
        texts = {part.number: self.reader.text(part.span, NAME_BYTES_MAX) for part in self._messages(span, {1, 2})}
        yield texts.get(1, ""), texts.get(2, "")

    def _messages(self, span: Span, numbers: set[int]) -> Iterator[Field]:
        for part in self.reader.fields(span):
            if part.number in numbers:
                if part.wire_type != LEN:
                    raise Malformed(f"field {part.number} at byte {part.span.start} has wire type {part.wire_type}")
                yield part


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Malformed(f"{text[:40]!r} is not an offset or a length")
    return int(text)
