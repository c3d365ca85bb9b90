"""What a model answers on the publisher's machine: the only place of the command line that needs a runtime.

ONNX Runtime is imported when samples are made and not before, so that the rest of `ferry` does without it.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.artifact.tensors import Array
from common.errors import InvalidInput
from controller.cli.pipelines import PipelineDraft

INSTALL = "pip install 'edgeferry[selftest]'"
LOG_NOTHING = 4
"""Severity "fatal": what the runtime would print is in the exception too."""
FIX = "give inputs that the model takes; made-up ones do not fit every model"


class Extras(NamedTuple):
    """What a variant has besides its model: open steps, and libraries with operators."""

    pipeline: PipelineDraft | None = None
    libraries: tuple[Path, ...] = ()


NO_EXTRAS = Extras()


class Answers(NamedTuple):
    """By sample and output, and how long the slowest sample took, in seconds."""

    outputs: dict[str, dict[str, Array]]
    slowest_s: float


class Reference:
    """The model in the file `model` with its `extras`, loaded as devices load it, on one thread. Without `optimised`
    the graph is run as it was written: other kernels compute the same, which shows how much the answers depend on them.

    `InvalidInput` when there is no runtime here, or it does not load the model.
    """

    def __init__(self, model: Path, extras: Extras = NO_EXTRAS, *, optimised: bool = True) -> None:
        self._name = model.name
        self._pipeline = extras.pipeline
        self._session = _load(model, extras.libraries, optimised=optimised)

    def run(self, samples: Mapping[str, Mapping[str, Array]], outputs: Sequence[str]) -> Answers:
        """Each sample once; `InvalidInput` names one that the model fails on."""
        found: dict[str, dict[str, Array]] = {}
        slowest_s = 0.0
        for name, feeds in samples.items():
            started_at = time.monotonic()
            try:
                answer = self._answer(feeds, outputs)
            except Exception as error:  # the runtime's errors have no common base class
                raise InvalidInput(f"{name!r} on {self._name}: {_line(error)}", field="samples", fix=FIX) from error
            slowest_s = max(slowest_s, time.monotonic() - started_at)
            found[name] = answer
        return Answers(found, slowest_s)

    def _answer(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        if self._pipeline is None:
            return dict(zip(outputs, self._session.run(list(outputs), dict(feeds)), strict=True))
        names = [node.name for node in self._session.get_outputs()]
        raw = self._session.run(names, self._pipeline.before.run(feeds))
        answer = self._pipeline.after.run(dict(zip(names, raw, strict=True)))
        return {name: answer[name] for name in outputs}


def _load(model: Path, libraries: Sequence[Path], *, optimised: bool) -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise InvalidInput("a reference run needs onnxruntime", field="samples", fix=INSTALL) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = LOG_NOTHING
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    try:
        for library in libraries:
            options.register_custom_ops_library(str(library.resolve()))
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common base class
        fix = "no device would load it either; export it again"
        raise InvalidInput(f"{model.name} does not load: {_line(error)}", field="variants", fix=fix) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
