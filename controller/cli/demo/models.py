"""The four releases of the demo, made from two real ones.

v1 and v2 are the models of two releases of PyPI's `magika` (standard_v3_2 and its retrained successor standard_v3_3).
v3 is v2 with its final layer recalibrated: a bias per class, fitted on labelled files of this machine by minimising the
negative log-likelihood (vector scaling restricted to the bias; Guo et al., "On Calibration of Modern Neural Networks",
ICML 2017, section 4.2). v4 is v3 with one row of its embedding overwritten by a huge number, as a bit flip or a bad
export would: it loads, passes a warm-up, and answers NaN to any file that holds the letter `e`.

The fitting sees the model only through the probabilities that the fleet answered.
"""

import json
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from common.errors import NotFound

FINAL_BIAS = "MagikaV2/Dense_1/Reshape:0"
EMBEDDING_SHAPE = (257, 64)
BROKEN_TOKEN = ord("e")
BROKEN_VALUE = 3e38
"""Finite, so that tokens other than the broken one still give zero times it; the next sum overflows to infinity."""

FIT_STEPS = 300
FIT_RATE = 0.5
FIT_L2 = 0.01

Floats = npt.NDArray[np.float32]


class BaseModel(msgspec.Struct, frozen=True):
    """One model that the wheels carry, and the labels of its 214 outputs."""

    name: str
    onnx_file: Path
    labels: tuple[str, ...]


def find(models: Path) -> tuple[BaseModel, BaseModel]:
    """standard_v3_2 and standard_v3_3 below `models`, or `NotFound` with the command that fetches them."""
    return (
        _base(models / "magika-0.6.1/magika/models/standard_v3_2"),
        _base(models / "magika-0.6.3/magika/models/standard_v3_3"),
    )


def fit_bias(probabilities: Floats, targets: npt.NDArray[np.int64]) -> Floats:
    """The bias [classes] that makes `probabilities` [files, classes] most likely to say `targets` [files].

    Gradient descent on the mean negative log-likelihood of softmax(log p + bias) with an L2 penalty on the bias.
    """
    logits = np.log(np.maximum(probabilities, 1e-12))
    wanted = np.zeros_like(logits)
    wanted[np.arange(len(targets)), targets] = 1.0
    bias = np.zeros(logits.shape[1], dtype=np.float32)
    for _ in range(FIT_STEPS):
        gradient = (softmax(logits + bias) - wanted).mean(axis=0) + FIT_L2 * bias
        bias -= FIT_RATE * gradient.astype(np.float32)
    return bias


def negative_log_likelihood(probabilities: Floats, targets: npt.NDArray[np.int64], bias: Floats | float = 0.0) -> float:
    """Mean over files, in nats."""
    logits = np.asarray(np.log(np.maximum(probabilities, 1e-12)) + bias, dtype=np.float32)
    likely = softmax(logits)[np.arange(len(targets)), targets]
    return float(-np.log(np.maximum(likely, 1e-12)).mean())


def recalibrated(source: Path, bias: Floats, destination: Path) -> None:
    """Write the model at `source` with `bias` [classes] added to its final layer's."""
    model = onnx.load(source)
    layer = next(entry for entry in model.graph.initializer if entry.name.endswith(FINAL_BIAS))
    layer.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(layer) + bias[None, :], layer.name))
    onnx.save(model, destination)


def broken(source: Path, destination: Path) -> None:
    """Write the model at `source` with the embedding of one common byte ruined."""
    model = onnx.load(source)
    table = next(entry for entry in model.graph.initializer if tuple(entry.dims) == EMBEDDING_SHAPE)
    rows = numpy_helper.to_array(table).copy()
    rows[BROKEN_TOKEN] = BROKEN_VALUE
    table.CopyFrom(numpy_helper.from_array(rows, table.name))
    onnx.save(model, destination)


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True), dtype=np.float32)


def _base(folder: Path) -> BaseModel:
    config = folder / "config.min.json"
    if not config.is_file():
        raise NotFound(f"no model in {folder}", field="--models", fix="run `make demo`, which fetches the models")
    labels = json.loads(config.read_text())["target_labels_space"]
    return BaseModel(folder.name, folder / "model.onnx", tuple(labels))
