"""Weights in files beside the model: found wherever they are named, and only plain names inside the files pass."""

import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from common.artifact import digest_of
from common.artifact.external import ExternalTensor, data_files, data_spans
from common.artifact.manifest import FILES_PER_VARIANT_MAX
from common.artifact.onnx_io import GRAPHS_DEEP_MAX, OnnxSignature, read_signature
from common.artifact.parts import cut
from common.artifact.protobuf import Span
from common.artifact.source import BytesSource
from common.errors import InvalidInput
from common.filesource import FileSource
from controller.registry.inspection import inspect_build
from tests.small_models import model_bytes

SIZE = 10_000


def test_tensors_that_onnx_saved_outside_are_found_where_onnx_put_them(tmp_path: Path) -> None:
    weights = [np.arange(3000, dtype=np.float32), np.arange(5000, dtype=np.float32) * 2]
    model = onnx.load_from_string(
        model_bytes(initializers=[numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])
    )
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    with FileSource(tmp_path / "m.onnx") as source:
        signature = read_signature(source)
    data = (tmp_path / "m.data").read_bytes()
    spans = data_spans(signature.external, {"m.data": len(data)})["m.data"]
    found = [np.frombuffer(data[start:end], np.float32) for start, end in spans]
    assert [list(one) for one in found] == [list(one) for one in weights]
    assert signature.payloads == ()


def test_payloads_inside_the_file_are_found_in_every_field_that_holds_some() -> None:
    raw = numpy_helper.from_array(np.full(2000, 7, np.float32), "raw")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [2000], [3.0] * 2000)
    small = numpy_helper.from_array(np.ones(3, np.float32), "small")
    data = model_bytes(initializers=[raw, small, typed])
    spans = read_signature(BytesSource(data)).payloads
    assert [np.frombuffer(data[start:end], np.float32)[0] for start, end in spans] == [7.0, 3.0]
    assert [span.end - span.start for span in spans] == [8000, 8000]


def test_tensors_in_attributes_in_inner_graphs_and_in_functions_are_found() -> None:
    model = onnx.load_from_string(model_bytes())
    inner = helper.make_graph([_constant("deep")], "inner", [], [])
    inner.initializer.append(external("inside", "d.data"))
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner))
    model.graph.node.append(_constant("flat"))
    values, indices = external("values", "d.data"), external("indices", "d.data")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[3])
    model.graph.sparse_initializer.append(sparse)
    model.functions.append(onnx.FunctionProto(name="f", node=[_constant("called")]))
    found = {tensor.name for tensor in read_signature(BytesSource(model.SerializeToString())).external}
    assert found == {"deep", "inside", "flat", "values", "indices", "called"}


def test_graphs_inside_one_another_without_end_are_refused() -> None:
    graph = b""
    for _ in range(GRAPHS_DEEP_MAX + 2):
        graph = _field(1, _field(5, _field(6, graph)))  # the onnx package itself cannot nest so deep
    with pytest.raises(InvalidInput, match="inside one another"):
        read_signature(BytesSource(model_bytes() + _field(7, graph)))


def test_data_of_more_than_two_gigabytes_is_placed_without_being_read(tmp_path: Path) -> None:
    whole = 3 * 2**30
    with (tmp_path / "w.data").open("wb") as data:
        data.truncate(whole)
    last = whole - 4 * 100_000
    tensors = [external("first", "w.data"), external("last", "w.data", offset=str(last), length="400000")]
    (tmp_path / "m.onnx").write_bytes(model_bytes(initializers=tensors))
    paths = {name: tmp_path / name for name in ("m.onnx", "w.data")}
    names = {digest_of(name.encode()): path for name, path in paths.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    build = inspect_build(
        "default", {path.name: digest for digest, path in names.items()}, lambda digest, _field: names[digest]
    )
    assert build.variant.size == whole + paths["m.onnx"].stat().st_size
    spans = build.tensors[digest_of(b"w.data")]
    assert spans == (Span(0, 12), Span(last, whole))
    assert cut(spans, whole)[-1] == Span(last, whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "kB: nothing of the file is held"


@pytest.mark.parametrize("offset", ["-1", "1e3", "", "٣", "1" * 30])
def test_a_place_that_is_no_number_is_refused(offset: str) -> None:
    with pytest.raises(InvalidInput, match="not a number"):
        read(external("w", "d.data", offset=offset))


def test_without_offset_and_length_a_tensor_is_the_whole_file() -> None:
    assert read(external("w", "d.data", offset=None, length=None)).external == (ExternalTensor("w", "d.data", 0, None),)
    spans = data_spans([ExternalTensor("w", "d.data", 0, None), ExternalTensor("v", "d.data", 7, 3)], {"d.data": SIZE})
    assert spans == {"d.data": (Span(0, SIZE), Span(7, 10))}


@pytest.mark.parametrize(
    "name",
    ["../d.data", "/etc/passwd", "sub/d.data", "./d.data", "..", ".", "", ".hidden", "d.data\n", "C:\\d", "a" * 129],
)
def test_only_plain_file_names_pass(name: str) -> None:
    with pytest.raises(InvalidInput, match="external data in") as caught:
        data_files([ExternalTensor("w", name, 0, None)])
    assert "same folder" in str(caught.value.fix)


def test_a_model_in_too_many_files_is_told_how_to_save_it() -> None:
    tensors = [ExternalTensor("w", f"w{n}", 0, None) for n in range(FILES_PER_VARIANT_MAX)]
    with pytest.raises(InvalidInput, match="16 files") as caught:
        data_files(tensors)
    assert "one file" in str(caught.value.fix)
    assert len(data_files(tensors[1:])) == FILES_PER_VARIANT_MAX - 1


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({}, "'d.data' are missing"),
        ({"d.data": SIZE, "e.data": 1}, "does not name the file 'e.data'"),
        ({"d.data": 99}, "reaches to byte 100"),
    ],
)
def test_the_files_must_be_those_that_the_model_names(sizes: dict[str, int], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        data_spans([ExternalTensor("w", "d.data", 10, 90)], sizes)


def test_a_tensor_that_begins_behind_the_end_is_refused() -> None:
    with pytest.raises(InvalidInput, match="reaches to byte 101"):
        data_spans([ExternalTensor("w", "d.data", 101, None)], {"d.data": 100})


def external(name: str, location: str, offset: str | None = "0", length: str | None = "12") -> TensorProto:
    """A tensor that says its bytes are in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def read(*tensors: TensorProto) -> OnnxSignature:
    return read_signature(BytesSource(model_bytes(initializers=tensors)))


def _constant(name: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=external(name, "d.data"))


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, rest = bytearray(), len(payload)
    while rest > 0x7F:
        length.append(0x80 | rest & 0x7F)
        rest >>= 7
    return bytes([number << 3 | 2, *length, rest]) + payload
