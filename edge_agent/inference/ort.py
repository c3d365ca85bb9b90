"""ONNX Runtime behind the engine port.

How sessions are made, and why (each was measured):

- from a path, because loading from bytes holds the GIL and stalls every other thread for the whole load;
- one thread inside an operator and no spinning: parallelism comes from answering several requests at once, and two
  spinning threads doubled the CPU cost of an inference;
- a large request gives its scratch memory back at once: an arena otherwise keeps what the largest batch ever took
  (1.3 GB after one batch of 256 of a 3 MB model, 73 MB with this).

The official builds for Linux tell their vendor about sessions (model file names, hashes, timings) from 1.29 on, unless
they are told not to before they are loaded. What a device runs is nobody's business but its owner's.
"""

import os
import platform
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

from common.artifact import TensorSpec
from common.artifact.tensors import Array
from common.errors import FerryError, NotFound, Unavailable
from edge_agent.inference.custom_ops import loadable, refuse_custom_ops
from edge_agent.inference.engine import NOTHING, Beside, EngineFailure
from edge_agent.inference.providers import CPU

ARENA_KEEP_INPUT_BYTES = 256 * 1024
"""Requests with larger inputs give their scratch memory back when they are done."""

THREADS = 1
WEIGHTS_SUFFIX = ".data"
CPUINFO = Path("/proc/cpuinfo")
_CONFIG = {"session.intra_op.allow_spinning": "0"}

LOG_NOTHING = 4
"""Severity "fatal": what the runtime would print is in the exception too."""

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")


class OrtEngine:
    """Loads ONNX files, for the CPU unless told; releases with custom operators only if `custom_ops`."""

    platform = "onnxruntime_onnx"

    def __init__(self, *, custom_ops: bool = False) -> None:
        self._custom_ops = custom_ops

    @property
    def version(self) -> str:
        """The runtime's version."""
        return str(onnxruntime.__version__)

    def providers(self) -> list[str]:
        """The execution providers that this runtime was built with."""
        return list(onnxruntime.get_available_providers())

    def doubt(self, _: Path) -> bool:
        """See `Engine.doubt`: there is one way."""
        return False

    def load(self, path: Path, beside: Beside = NOTHING) -> "OrtSession":
        """See `Engine.load`."""
        return self.load_on(path, beside, CPU)

    def load_on(self, path: Path, beside: Beside, provider: str) -> "OrtSession":
        """`load` with another execution provider than the CPU, which still runs what that does not take."""
        libraries = beside.libraries
        if not path.is_file():
            raise NotFound(f"no model file at {path}")
        if libraries and not self._custom_ops:
            raise refuse_custom_ops()
        return _open(path, _options(), provider, libraries)

    @property
    def setup(self) -> str:
        """All that an optimised graph depends on besides the model: runtime, options, processor."""
        made = (onnxruntime.__version__, onnxruntime.get_build_info(), platform.machine(), _processor())
        return "\n".join((*made, *(f"{key}={value}" for key, value in sorted(_CONFIG.items())), f"threads={THREADS}"))

    def on_cpu(self, _: Path, beside: Beside) -> bool:
        """See `Optimiser.on_cpu`: operators of a release's own may do other things when the graph is read again."""
        return not beside.libraries

    def optimise(self, path: Path, target: Path) -> "OrtSession":
        """`load`, and write the optimised graph to `target`, its weights beside it; see `Optimiser.optimise`."""
        options = _options()
        options.optimized_model_filepath = str(target)
        weights = target.name + WEIGHTS_SUFFIX
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
        return _open(path, options)

    def load_optimised(self, path: Path) -> "OrtSession":
        """A session for what `optimise` wrote; its weights are mapped, not read."""
        options = _options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return _open(path, options)


class OrtSession:
    """One loaded ONNX model. Only what is `feedable` takes other weights: another provider than the CPU has shown that
    it answers rightly with those that it has.
    """

    def __init__(self, session: onnxruntime.InferenceSession, *, feedable: bool = True) -> None:
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        initializers = session.get_overridable_initializers() if feedable else ()
        self.overridable = tuple(_spec(node) for node in initializers)
        self._session = session
        self._running: dict[int, onnxruntime.RunOptions] = {}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """See `Session.run`."""
        return self.run_with(feeds, {}, outputs)

    def run_with(
        self, feeds: Mapping[str, Array], given: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """`run` with other values for some of `overridable`; see `edge_agent.inference.live`."""
        options = onnxruntime.RunOptions()
        if sum([array.nbytes for array in feeds.values()]) > ARENA_KEEP_INPUT_BYTES:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        thread = threading.get_ident()
        self._running[thread] = options
        try:
            arrays = self._session.run(list(outputs), {**feeds, **given} if given else feeds, options)
        except Exception as error:  # the runtime's errors have no common base class
            raise _named(error, "the model failed") from error
        finally:
            del self._running[thread]
        return dict(zip(outputs, arrays, strict=True))

    def stop(self, thread: int) -> None:
        """See `Session.stop`. The runtime looks at the flag between two operators, also inside loops."""
        options = self._running.get(thread)
        if options is not None:
            options.terminate = True

    def close(self) -> None:
        """See `Session.close`."""
        del self._session


def _open(
    path: Path, options: onnxruntime.SessionOptions, provider: str = CPU, libraries: Sequence[Path] = ()
) -> OrtSession:
    try:
        for name in loadable(libraries):
            options.register_custom_ops_library(name)
        session = onnxruntime.InferenceSession(str(path), options, providers=list(dict.fromkeys([provider, CPU])))
    except FerryError:
        raise
    except Exception as error:  # the runtime's errors have no common base class
        raise _named(error, f"cannot load {path.name}") from error
    if provider not in session.get_providers():
        raise EngineFailure(f"the runtime cannot use {provider} here")
    session.disable_fallback()
    return OrtSession(session, feedable=provider == CPU)


def _processor() -> str:
    """The first processor's features, as Linux tells them; empty where it does not."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = THREADS
    for key, value in _CONFIG.items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = LOG_NOTHING
    return options


def _spec(node: onnxruntime.NodeArg) -> TensorSpec:
    """An input or output as a spec. Types that the protocol lacks keep their ONNX name and match no manifest."""
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in node.shape)
    return TensorSpec(node.name, _DATATYPES.get(node.type, node.type), shape)


def _named(error: Exception, what: str) -> EngineFailure | Unavailable:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return Unavailable(f"{what}: no memory left: {text}")
    return EngineFailure(f"{what}: {text}")
