"""ONNX models made from other models: the same weights in another file, or MiniLM's weights in a graph of their own.

Pure functions from bytes to bytes (or to a few files' bytes). Needs onnx and never torch. Everything is deterministic.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.delta.minilm_shape import HEADS, HIDDEN, LAYER_NORM_EPSILON, LAYERS
from benchmarks.delta.tensors import Tensor, of_safetensors

OPSET = 20  # the first with Gelu
SEED = 7
CHANGED_TENSOR_BYTES = 856
WEIGHTS_FILE = "weights.bin"
ALIGNMENT = 4096  # of external tensors, as the format's authors advise for memory mapping


def with_metadata(model_bytes: bytes) -> bytes:
    """A later day, a later version: strings outside the graph, some longer than before."""
    model = onnx.load_from_string(model_bytes)
    model.producer_version = "2.13.0"
    strings = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**strings, "date": "2026-05-04", "version": "1.0.1"})
    return _written(model)


def with_changed_graph(model_bytes: bytes) -> bytes:
    """Another opset and an extra node before the first output; the weights stay where they were among themselves."""
    model = onnx.load_from_string(model_bytes)
    model.opset_import[0].version += 1
    graph = model.graph
    name = graph.output[0].name
    producer = next(node for node in graph.node if name in node.output)
    producer.output[list(producer.output).index(name)] = f"{name}_before"
    graph.node.append(helper.make_node("Identity", [f"{name}_before"], [name], f"{name}_identity"))
    return _written(model)


def re_exported(model_bytes: bytes) -> bytes:
    """What another exporter makes of the same weights: initialisers in another order, nodes and values renamed."""
    model = onnx.load_from_string(model_bytes)
    graph = model.graph
    model.producer_version = "2.13.0"
    order = np.random.default_rng(SEED).permutation(len(graph.initializer))
    initialisers = [graph.initializer[place] for place in order]
    fixed = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    renamed = _renamed(graph, fixed)
    for number, node in enumerate(graph.node):
        node.name = f"node_{node.op_type}_{number}"
        node.input[:] = [renamed.get(value, value) for value in node.input]
        node.output[:] = [renamed.get(value, value) for value in node.output]
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in initialisers]
    del graph.initializer[:]
    graph.initializer.extend(copies)
    return _written(model)


def _renamed(graph: onnx.GraphProto, fixed: set[str]) -> dict[str, str]:
    values = [value for node in graph.node for value in node.output if value and value not in fixed]
    return {value: f"val_{number}" for number, value in enumerate(values)}


def recalibrated(model_bytes: bytes) -> bytes:
    """New values in the first tensor of `CHANGED_TENSOR_BYTES`, every other byte the same."""
    tensors = onnx.load_from_string(model_bytes).graph.initializer
    raw = next(tensor.raw_data for tensor in tensors if len(tensor.raw_data) == CHANGED_TENSOR_BYTES)
    changed = np.frombuffer(raw, np.float32) + np.random.default_rng(SEED).normal(0, 0.01, len(raw) // 4)
    return model_bytes.replace(raw, changed.astype(np.float32).tobytes(), 1)


def _written(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


class External(NamedTuple):
    """A model whose tensors are in a file of their own."""

    graph: bytes
    weights: bytes


def minilm_in_one_file(safetensors: bytes) -> bytes:
    """MiniLM as one ONNX file, the weights inside."""
    return _written(_minilm(of_safetensors(safetensors), _inside))


def minilm_external(safetensors: bytes) -> External:
    """MiniLM as a graph and a file of weights beside it (ONNX external data), tensors aligned."""
    weights = bytearray()

    def place(name: str, values: Tensor) -> TensorProto:
        weights.extend(bytes(-len(weights) % ALIGNMENT))
        tensor = _described(name, values)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": WEIGHTS_FILE, "offset": str(len(weights)), "length": str(len(values.data))}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)
        weights.extend(values.data)
        return tensor

    graph = _minilm(of_safetensors(safetensors), place)
    return External(_written(graph), bytes(weights))


def _described(name: str, values: Tensor) -> TensorProto:
    types = {"F32": TensorProto.FLOAT, "I64": TensorProto.INT64}
    return TensorProto(name=name, data_type=types[values.dtype], dims=values.shape)


def _inside(name: str, values: Tensor) -> TensorProto:
    tensor = _described(name, values)
    tensor.raw_data = values.data
    return tensor


def _minilm(tensors: Mapping[str, Tensor], place: Callable[[str, Tensor], TensorProto]) -> onnx.ModelProto:
    """One text without padding, int64 [1, length], to its classes, float32 [1, classes]."""
    nodes = _Nodes()
    words = nodes("Gather", "embeddings.word_embeddings.weight", "tokens")
    places = nodes("Slice", "embeddings.position_embeddings.weight", "zero", nodes("Shape", "tokens", start=1))
    kind = nodes("Gather", "embeddings.token_type_embeddings.weight", "zero")
    hidden = nodes.normed("embeddings.LayerNorm", nodes("Add", nodes("Add", words, places), kind))
    for layer in range(LAYERS):
        hidden = _layer(nodes, f"encoder.layer.{layer}", hidden)
    pooled = nodes("ReduceMean", hidden, "one", keepdims=0)
    logits = nodes.linear("classifier", pooled)
    nodes.made.append(helper.make_node("Identity", [logits], ["logits"]))
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, "length"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None])]
    used = {name for node in nodes.made for name in node.input}
    initialisers = [place(name, values) for name, values in tensors.items() if name in used]
    initialisers += [_constant(name, values) for name, values in _CONSTANTS.items()]
    graph = helper.make_graph(nodes.made, "minilm", inputs, outputs, initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


_CONSTANTS: Mapping[str, Sequence[int]] = {"zero": [0], "one": [1], "split": [0, 0, HEADS, -1], "join": [0, 0, HIDDEN]}


def _constant(name: str, values: Sequence[int]) -> TensorProto:
    return _inside(name, Tensor("I64", (len(values),), np.array(values, np.int64).tobytes()))


def _layer(nodes: "_Nodes", prefix: str, hidden: str) -> str:
    attended = nodes.linear(f"{prefix}.attention.output.dense", _attention(nodes, f"{prefix}.attention.self", hidden))
    hidden = nodes.normed(f"{prefix}.attention.output.LayerNorm", nodes("Add", hidden, attended))
    inner = nodes("Gelu", nodes.linear(f"{prefix}.intermediate.dense", hidden))
    return nodes.normed(
        f"{prefix}.output.LayerNorm", nodes("Add", hidden, nodes.linear(f"{prefix}.output.dense", inner))
    )


def _attention(nodes: "_Nodes", prefix: str, hidden: str) -> str:
    parts = [nodes("Reshape", nodes.linear(f"{prefix}.{part}", hidden), "split") for part in ("query", "key", "value")]
    query, value = (nodes("Transpose", part, perm=[0, 2, 1, 3]) for part in (parts[0], parts[2]))
    key = nodes("Transpose", parts[1], perm=[0, 2, 3, 1])
    scale = nodes("Constant", value_float=(HIDDEN // HEADS) ** -0.5)
    shares = nodes("Softmax", nodes("Mul", nodes("MatMul", query, key), scale), axis=-1)
    return nodes("Reshape", nodes("Transpose", nodes("MatMul", shares, value), perm=[0, 2, 1, 3]), "join")


class _Nodes:
    """Collects nodes; calling it adds one and answers the name of its output."""

    def __init__(self) -> None:
        self.made: list[onnx.NodeProto] = []

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(self.made)}"
        self.made.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def linear(self, name: str, values: str) -> str:
        weight = self("Transpose", f"{name}.weight")
        return self("Add", self("MatMul", values, weight), f"{name}.bias")

    def normed(self, name: str, values: str) -> str:
        return self("LayerNormalization", values, f"{name}.weight", f"{name}.bias", epsilon=LAYER_NORM_EPSILON)
