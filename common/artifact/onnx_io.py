"""What goes into an ONNX model and what comes out, read from the file's structure alone.

The weights are skipped, never read, so a model of a gigabyte costs about as much as one of a kilobyte, and neither
onnx nor protobuf has to be installed where a release is published. Only what a release needs is checked: that the file
is an ONNX model whose inputs and outputs are tensors of known rank. Whether its operators make sense is for the engine
to say. Where the weights lie is found on the way: in this file, or in others beside it (`common.artifact.external`).

Source: onnx/onnx.proto (ModelProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, TypeProto) and docs/IR.md of
the ONNX project. An initializer that is also listed as a graph input is a default value, not something a caller must
send, and is left out. Tensors are looked for everywhere: in initializers, in nodes' attributes, in graphs inside these,
and in functions.
"""

from dataclasses import dataclass, field

import msgspec

from common.artifact.external import ExternalTensor
from common.artifact.parts import PART_BYTES_MIN
from common.artifact.protobuf import LEN, VARINT, Field, Malformed, Span, WireReader, signed
from common.artifact.source import ByteSource
from common.artifact.tensor_spec import TensorSpec
from common.errors import InvalidInput

NAME_BYTES_MAX = 1024
TENSORS_MAX = 256
"""Inputs, and outputs, of one model."""
RANK_MAX = 32
OPSETS_MAX = 64
INITIALIZERS_MAX = 200_000
GRAPHS_DEEP_MAX = 32
"""Graphs inside attributes of nodes of graphs inside..."""
DECIMAL_DIGITS_MAX = 19
OPEN_AXIS = -1
DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})

DATATYPES = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64",
}  # fmt: skip
"""TensorProto.DataType to the name in the Open Inference Protocol V2; what is missing has none there."""

PAYLOAD_FIELDS = frozenset({4, 5, 7, 9, 10, 11})
"""TensorProto's float_data, int32_data, int64_data, raw_data, double_data and uint64_data."""

FIX_NOT_ONNX = "upload the .onnx file as the exporter wrote it, complete"


class OnnxSignature(msgspec.Struct, frozen=True, kw_only=True):
    """`opset` is the version of the default operator set (0 if the model only uses others); -1 is an open axis.

    `payloads` are the places of the larger tensors' bytes in this file, `external` the tensors that lie in others.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    producer: str
    payloads: tuple[Span, ...] = ()
    external: tuple[ExternalTensor, ...] = ()


def read_signature(source: ByteSource) -> OnnxSignature:
    """The inputs, outputs and versions of the ONNX model in `source`.

    `InvalidInput` (field `model`) when it is not a complete ONNX model, or has an input or output that a device could
    not serve.
    """
    try:
        return _Model(WireReader(source)).signature()
    except Malformed as error:
        raise InvalidInput(f"not an ONNX model: {error}", field="model", fix=FIX_NOT_ONNX) from error


@dataclass
class _Model:
    """Collects what the walk finds. A message field that occurs twice is merged, as protobuf says."""

    reader: WireReader
    ir_version: int = 0
    producer: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: list[Span] = field(default_factory=list)
    outputs: list[Span] = field(default_factory=list)
    initializers: set[str] = field(default_factory=set)
    payloads: list[Span] = field(default_factory=list)
    external: list[ExternalTensor] = field(default_factory=list)

    def signature(self) -> OnnxSignature:
        for part in self.reader.fields(self.reader.whole):
            match part:
                case Field(number=1, wire_type=0, value=value):
                    self.ir_version = value
                case Field(number=2):
                    self.producer = self._text(part)
                case Field(number=7):
                    self._graph(_message(part))
                case Field(number=8):
                    self._opset(_message(part))
                case Field(number=25):
                    self._function(_message(part))
        self._check_complete()
        named = [(self._value_name(span), span) for span in self.inputs]
        return OnnxSignature(
            inputs=tuple(self._tensor(span, "input") for name, span in named if name not in self.initializers),
            outputs=tuple(self._tensor(span, "output") for span in self.outputs),
            opset=max((self.opsets.get(domain, 0) for domain in DEFAULT_DOMAINS), default=0),
            ir_version=self.ir_version,
            producer=self.producer,
            payloads=tuple(sorted(self.payloads)),
            external=tuple(self.external),
        )

    def _check_complete(self) -> None:
        missing = [
            what
            for what, found in (
                ("IR version", self.ir_version),
                ("operator set", self.opsets),
                ("graph outputs", self.outputs),
            )
            if not found
        ]
        if missing:
            raise Malformed(f"it has no {', '.join(missing)}")

    def _opset(self, span: Span) -> None:
        domain, version = "", 0
        for part in self.reader.fields(span):
            if part.number == 1:
                domain = self._text(part)
            elif part.number == 2 and part.wire_type == VARINT:
                version = signed(part.value)
        if len(self.opsets) >= OPSETS_MAX:
            raise Malformed(f"more than {OPSETS_MAX} operator sets")
        self.opsets[domain] = version

    def _graph(self, span: Span) -> None:
        for part in self.reader.fields(span):
            match part.number:
                case 1:
                    self._node(_message(part), GRAPHS_DEEP_MAX)
                case 5:
                    self._default(self._stored_tensor(_message(part)))
                case 11:
                    self._keep(self.inputs, part, "inputs")
                case 12:
                    self._keep(self.outputs, part, "outputs")
                case 15:
                    self._default(self._sparse_tensor(_message(part)))

    def _function(self, span: Span) -> None:
        for part in self.reader.fields(span):
            if part.number == 7:
                self._node(_message(part), GRAPHS_DEEP_MAX)

    def _node(self, span: Span, deeper: int) -> None:
        """Look for tensors in the attributes of a node; `deeper` is how many graphs may lie inside one another."""
        attributes = [_message(part) for part in self.reader.fields(span) if part.number == 5]
        for attribute in attributes:
            for part in self.reader.fields(attribute):
                match part.number:
                    case 5 | 10:
                        self._stored_tensor(_message(part))
                    case 22 | 23:
                        self._sparse_tensor(_message(part))
                    case 6 | 11:
                        self._inner_graph(_message(part), deeper - 1)

    def _inner_graph(self, span: Span, deeper: int) -> None:
        if deeper < 0:
            raise Malformed(f"more than {GRAPHS_DEEP_MAX} graphs inside one another at byte {span.start}")
        for part in self.reader.fields(span):
            match part.number:
                case 1:
                    self._node(_message(part), deeper)
                case 5:
                    self._stored_tensor(_message(part))
                case 15:
                    self._sparse_tensor(_message(part))

    def _keep(self, spans: list[Span], part: Field, what: str) -> None:
        # Before IR version 4 every initializer is listed as an input too, so the bound holds for the sum.
        if len(spans) >= TENSORS_MAX + len(self.initializers):
            raise Malformed(f"more than {TENSORS_MAX} {what}")
        spans.append(_message(part))

    def _default(self, name: str) -> None:
        if len(self.initializers) >= INITIALIZERS_MAX:
            raise Malformed(f"more than {INITIALIZERS_MAX} initializers")
        self.initializers.add(name)

    def _stored_tensor(self, span: Span) -> str:
        """Take down where the tensor's bytes lie; its name."""
        name, elsewhere, entries = "", False, {}
        for part in self.reader.fields(span):
            if part.number == 8:
                name = self._text(part)
            elif part.number in PAYLOAD_FIELDS and part.wire_type == LEN:
                if part.span.end - part.span.start >= PART_BYTES_MIN:
                    self.payloads.append(part.span)
            elif part.number == 13:
                key, value = self._entry(_message(part))
                entries[key] = value
            elif part.number == 14 and part.wire_type == VARINT:
                elsewhere = part.value == 1
        if elsewhere:
            self._keep_external(name, entries)
        return name

    def _keep_external(self, name: str, entries: dict[str, str]) -> None:
        if len(self.external) >= INITIALIZERS_MAX:
            raise Malformed(f"more than {INITIALIZERS_MAX} tensors in other files")
        length = _decimal(entries["length"], name) if "length" in entries else None
        offset = _decimal(entries.get("offset", "0"), name)
        self.external.append(ExternalTensor(name, entries.get("location", ""), offset, length))

    def _entry(self, span: Span) -> tuple[str, str]:
        texts = {part.number: self._text(part) for part in self.reader.fields(span) if part.number in {1, 2}}
        return texts.get(1, ""), texts.get(2, "")

    def _sparse_tensor(self, span: Span) -> str:
        """The name is that of the values; the indices are a tensor too."""
        name = ""
        for part in self.reader.fields(span):
            if part.number == 1:
                name = self._stored_tensor(_message(part))
            elif part.number == 2:
                self._stored_tensor(_message(part))
        return name

    def _value_name(self, span: Span) -> str:
        names = [self._text(part) for part in self.reader.fields(span) if part.number == 1]
        if not names or not names[-1]:
            raise Malformed(f"an input or output without a name at byte {span.start}")
        return names[-1]

    def _tensor(self, span: Span, what: str) -> TensorSpec:
        name = self._value_name(span)
        types = [_message(part) for part in self.reader.fields(span) if part.number == 2]
        kinds = [part for outer in types for part in self.reader.fields(outer) if part.number in {1, 4, 5, 8, 9, 7}]
        if not kinds or kinds[-1].number != 1:
            fix = "export it so that every input and output is a dense tensor (scikit-learn: zipmap=False)"
            raise InvalidInput(f"{what} {name!r} is not a tensor", field="model", fix=fix)
        return self._tensor_of_type(_message(kinds[-1]), f"{what} {name!r}", name)

    def _tensor_of_type(self, span: Span, what: str, name: str) -> TensorSpec:
        element, shape = 0, None
        for part in self.reader.fields(span):
            if part.number == 1 and part.wire_type == VARINT:
                element = part.value
            elif part.number == 2:
                shape = self._shape(_message(part))
        if element not in DATATYPES:
            fix = f"devices serve {', '.join(DATATYPES.values())}"
            raise InvalidInput(f"{what} has element type {element}", field="model", fix=fix)
        if shape is None:
            fix = "give every input and output a shape; open axes are fine (onnx.shape_inference may do it)"
            raise InvalidInput(f"{what} has no shape", field="model", fix=fix)
        return TensorSpec(name, DATATYPES[element], shape)

    def _shape(self, span: Span) -> tuple[int, ...]:
        axes = [self._axis(_message(part)) for part in self.reader.fields(span) if part.number == 1]
        if len(axes) > RANK_MAX:
            raise Malformed(f"a tensor of {len(axes)} axes at byte {span.start}, the limit is {RANK_MAX}")
        return tuple(axes)

    def _axis(self, span: Span) -> int:
        size = OPEN_AXIS
        for part in self.reader.fields(span):
            if part.number == 1 and part.wire_type == VARINT:
                size = signed(part.value)
            elif part.number == 2:
                size = OPEN_AXIS
        return size if size >= 0 else OPEN_AXIS

    def _text(self, part: Field) -> str:
        return self.reader.text(_message(part), NAME_BYTES_MAX)


def _message(part: Field) -> Span:
    if part.wire_type != LEN:
        raise Malformed(f"field {part.number} at byte {part.span.start} has wire type {part.wire_type}")
    return part.span


def _decimal(text: str, tensor: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= DECIMAL_DIGITS_MAX):
        raise Malformed(f"the place of tensor {tensor!r} in its file is {text[:40]!r}, not a number")
    return int(text)
