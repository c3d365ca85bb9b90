"""`edgeferry.top_k` 1: scores become the best few classes, with their names.

Of the tensor `input` (FP16, FP32 or FP64, classes along the last axis, any axes before it) it makes `top_indices`
(INT64) and `top_scores` (FP32), the best first, equal ones by index, and, where there are `labels`, `top_labels`
(BYTES). With `softmax` the scores become probabilities first: exp(x - max) / sum, in FP64.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from common.artifact.tensor_spec import TensorSpec
from common.artifact.tensors import DTYPES, Array
from common.errors import InvalidInput
from common.pipelines.parameters import parse, pick

K_MAX = 1000
INDICES, SCORES, LABELS = "top_indices", "top_scores", "top_labels"


class TopKParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`k` classes are kept; `labels` names all classes, in order; `input` may be left out if there is one tensor."""

    k: Annotated[int, Meta(ge=1, le=K_MAX)] = 5
    labels: tuple[str, ...] = ()
    softmax: bool = False
    input: str = ""


class TopK:
    """The open step."""

    def __init__(self, spec: TensorSpec, parameters: TopKParameters) -> None:
        self._parameters = parameters
        self._labels = np.array(parameters.labels, object)
        shape = (*spec.shape[:-1], parameters.k)
        kept = {INDICES: "INT64", SCORES: "FP32"} | ({LABELS: "BYTES"} if parameters.labels else {})
        self.inputs: tuple[TensorSpec, ...] = (spec,)
        self.outputs = tuple(TensorSpec(name, datatype, shape) for name, datatype in kept.items())
        self.row_wise = len(spec.shape) > 1

    def apply(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """See `common.pipelines.Step.apply`."""
        scores = arrays[self.inputs[0].name].astype(np.float64)
        if scores.shape[-1] < self._parameters.k:
            raise ValueError(f"{scores.shape[-1]} classes, and {self._parameters.k} are to be kept")
        if self._parameters.softmax:
            scores = _softmax(scores)
        indices = np.argsort(-scores, axis=-1, kind="stable")[..., : self._parameters.k].astype(np.int64)
        best = np.take_along_axis(scores, indices, axis=-1).astype(np.float32)
        named: dict[str, Array] = {LABELS: self._labels[indices]} if self._parameters.labels else {}
        return {INDICES: indices, SCORES: best, **named}


def open_top_k(parameters: Mapping[str, Any], inputs: tuple[TensorSpec, ...]) -> TopK:
    """See `common.pipelines.step.OpenStep`."""
    wanted = parse(TopKParameters, parameters)
    spec = pick(inputs, wanted.input)
    classes = spec.shape[-1] if spec.shape else 0
    if DTYPES[spec.datatype].kind != "f" or not spec.shape:
        raise InvalidInput(
            f"{spec.name} is no tensor of scores", field="parameters.input", fix="name a tensor of floats"
        )
    if 0 <= classes < wanted.k:
        raise InvalidInput(f"{wanted.k} of {classes} classes", field="parameters.k", fix=f"at most {classes}")
    if wanted.labels and classes >= 0 and len(wanted.labels) != classes:
        message = f"{len(wanted.labels)} names for {classes} classes"
        raise InvalidInput(message, field="parameters.labels", fix="give one for each class, in order")
    return TopK(spec, wanted)


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares
