"""What goes into an ONNX model and what comes out, read from the file's structure alone.

The weights are skipped, never read, so a model of a gigabyte costs about as much as one of a kilobyte, and neither
onnx nor protobuf has to be installed where a release is published. Only what a release needs is checked: that the file
is an ONNX model whose weights are inside it and whose inputs and outputs are tensors of known rank. Whether its
operators make sense is for the engine to say.

Source: onnx/onnx.proto (ModelProto, GraphProto, ValueInfoProto, TypeProto) and docs/IR.md of the ONNX project. An
initializer that is also listed as a graph input is a default value, not something a caller must send, and is left out.
External data of tensors inside node attributes is not looked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from common.artifact.manifest import TensorSpec
from common.artifact.protobuf import LEN, VARINT, Field, Malformed, Span, WireReader, signed
from common.artifact.source import ByteSource
from common.errors import InvalidInput

NAME_BYTES_MAX = 1024
TENSORS_MAX = 256
"""Inputs, and outputs, of one model."""
RANK_MAX = 32
OPSETS_MAX = 64
INITIALIZERS_MAX = 200_000
OPEN_AXIS = -1
DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})

DATATYPES = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64",
}  # fmt: skip
"""TensorProto.DataType to the name in the Open Inference Protocol V2; what is missing has none there."""

FIX_NOT_ONNX = "upload the .onnx file as the exporter wrote it, complete"


class OnnxSignature(msgspec.Struct, frozen=True, kw_only=True):
    """`opset` is the version of the default operator set (0 if the model only uses others); -1 is an open axis."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    producer: str


def read_signature(source: ByteSource) -> OnnxSignature:
    """The inputs, outputs and versions of the ONNX model in `source`.

    `InvalidInput` (field `model`) when it is not a complete ONNX model, keeps weights in other files, or has an input
    or output that a device could not serve.
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
        self._check_complete()
        named = [(self._value_name(span), span) for span in self.inputs]
        return OnnxSignature(
            inputs=tuple(self._tensor(span, "input") for name, span in named if name not in self.initializers),
            outputs=tuple(self._tensor(span, "output") for span in self.outputs),
            opset=max((self.opsets.get(domain, 0) for domain in DEFAULT_DOMAINS), default=0),
            ir_version=self.ir_version,
            producer=self.producer,
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
                case 5:
                    self._default(self._initializer_name(_message(part)))
                case 11:
                    self._keep(self.inputs, part, "inputs")
                case 12:
                    self._keep(self.outputs, part, "outputs")
                case 15:
                    for name in self._sparse_names(_message(part)):
                        self._default(name)

    def _keep(self, spans: list[Span], part: Field, what: str) -> None:
        # Before IR version 4 every initializer is listed as an input too, so the bound holds for the sum.
        if len(spans) >= TENSORS_MAX + len(self.initializers):
            raise Malformed(f"more than {TENSORS_MAX} {what}")
        spans.append(_message(part))

    def _default(self, name: str) -> None:
        if len(self.initializers) >= INITIALIZERS_MAX:
            raise Malformed(f"more than {INITIALIZERS_MAX} initializers")
        self.initializers.add(name)

    def _initializer_name(self, span: Span) -> str:
        name = ""
        for part in self.reader.fields(span):
            if part.number == 8:
                name = self._text(part)
            elif part.number == 14 and part.wire_type == VARINT and part.value == 1:
                fix = "save it as one file: onnx.save_model(model, path, save_as_external_data=False)"
                raise InvalidInput("the weights are in other files (external data)", field="model", fix=fix)
        return name

    def _sparse_names(self, span: Span) -> Iterator[str]:
        for part in self.reader.fields(span):
            if part.number == 1:
                yield self._initializer_name(_message(part))

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
