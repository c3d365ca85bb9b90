"""Small ONNX models made on the spot, each with one property that a test needs, and an engine that can be held up.

The models run on the real engine. All take `x`, FP32 [any, 4], unless they say otherwise, and answer `y`.
"""

import importlib.util
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper, save_model
from onnx.external_data_helper import set_external_data

from common.artifact import TensorSpec
from common.artifact.serving import ServingTerms
from common.artifact.tensors import Array
from common.clock import SystemClock
from common.ids import ModelName, Version
from edge_agent.inference.engine import NOTHING, Beside, Session
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder

MODEL = ModelName("adder")
X = (TensorSpec("x", "FP32", (-1, 4)),)
Y = (TensorSpec("y", "FP32", (-1, 4)),)
OPSET, IR_VERSION = 17, 8
WEIGHTS_FILE = "weights.bin"


def adder(path: Path, number: int) -> Path:
    """y = x + number: the answer tells which model gave it."""
    constant = numpy_helper.from_array(np.array([number], np.float32), "number")
    return _save(path, [helper.make_node("Add", ["x", "number"], ["y"])], [constant])


def slow_adder(path: Path, number: int) -> Path:
    """y = x + number, after some products with zeros that take time."""
    shapes = {"into": (4, 1024), "square": (1024, 1024), "back": (1024, 4)}
    constants = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()]
    constants.append(numpy_helper.from_array(np.array([number], np.float32), "number"))
    nodes = [helper.make_node("MatMul", ["x", "into"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{turn}", "square"], [f"h{turn + 1}"]) for turn in range(8)]
    nodes += [helper.make_node("MatMul", ["h8", "back"], ["zeros"]), helper.make_node("Add", ["x", "zeros"], ["same"])]
    return _save(path, [*nodes, helper.make_node("Add", ["same", "number"], ["y"])], constants)


def capped_adder(path: Path, number: int, most: float) -> Path:
    """y = min(x, most) + number."""
    constants = [numpy_helper.from_array(np.array([n], np.float32), name) for n, name in ((number, "n"), (most, "m"))]
    nodes = [helper.make_node("Min", ["x", "m"], ["capped"]), helper.make_node("Add", ["capped", "n"], ["y"])]
    return _save(path, nodes, constants)


def needs_rows(path: Path, rows: int) -> Path:
    """y = x + 1 for at least `rows` rows, an error for fewer, though the axis is open."""
    constants = [
        numpy_helper.from_array(np.array([rows - 1], np.int64), "last"),
        numpy_helper.from_array(np.array([0], np.float32), "zero"),
        numpy_helper.from_array(np.array([1], np.float32), "one"),
    ]
    nodes = [
        helper.make_node("Gather", ["x", "last"], ["row"], axis=0),
        helper.make_node("Mul", ["row", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["ones"]),
        helper.make_node("Add", ["x", "ones"], ["y"]),
    ]
    return _save(path, nodes, constants)


def channel_means(path: Path) -> Path:
    """scores = the mean of each channel of `image`, FP32 [1, 3, 2, 2]."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 2, 2])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 3])
    node = helper.make_node("ReduceMean", ["image"], ["scores"], axes=[2, 3], keepdims=0)
    graph = helper.make_graph([node], "means", [image], [scores])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    save_model(model, path)
    return path


def custom_ops_library() -> Path:
    """A real library with hundreds of operators. It is not imported: it cannot be in one process as a module too."""
    package = importlib.util.find_spec("onnxruntime_extensions")
    assert package
    assert package.origin
    return next(Path(package.origin).parent.glob("_extensions_pydll*.so"))


def upper_case(path: Path) -> Path:
    """y = x in capitals, both BYTES [any], by the operator of a library (`onnxruntime_extensions`)."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in ("x", "y"))
    node = helper.make_node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.contrib", 1)]
    graph = helper.make_graph([node], "upper", [x], [y])
    save_model(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), path)
    return path


def nan_unless_zero(path: Path) -> Path:
    """y = sqrt(-x*x): fine for the zeros of a warm-up, NaN for everything else."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Neg", ["square"], ["negative"]),
        helper.make_node("Sqrt", ["negative"], ["y"]),
    ]
    return _save(path, nodes, [])


def centred(path: Path) -> Path:
    """y = x - the mean over all rows: rows that depend on each other, though the signature does not show it."""
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return _save(path, nodes, [axes], opset=18)


def endless_unless_zero(path: Path) -> Path:
    """y = x, but for anything but zeros only after 2^62 turns of a loop."""
    turns = numpy_helper.from_array(np.array(2**62, np.int64), "turns")
    flag, number = helper.make_tensor_value_info, TensorProto.INT64
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["still"]), helper.make_node("Identity", ["carried"], ["kept"])],
        "turn",
        [
            flag("turn", number, []),
            flag("go_on", TensorProto.BOOL, []),
            flag("carried", TensorProto.FLOAT, ["n", 4]),
        ],
        [flag("still", TensorProto.BOOL, []), flag("kept", TensorProto.FLOAT, ["n", 4])],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["endless"], to=TensorProto.BOOL),
        helper.make_node("Loop", ["turns", "endless", "x"], ["y"], body=body),
    ]
    return _save(path, nodes, [turns])


def noisy(path: Path) -> Path:
    """y = x + a random number, another one in every run."""
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])]
    return _save(path, nodes, [])


def always_nan(path: Path) -> Path:
    """y = x / 0 for x = 0."""
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    return _save(path, [helper.make_node("Div", ["x", "zero"], ["y"])], [zero])


def raises_unless_zero(path: Path) -> Path:
    """Looks x up in a table of one row: an error of the engine for everything but zeros."""
    table = numpy_helper.from_array(np.zeros(1, np.float32), "table")
    nodes = [
        helper.make_node("Cast", ["x"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["y"]),
    ]
    return _save(path, nodes, [table])


def identity(path: Path, element: int, shape: Sequence[int | str]) -> Path:
    """y = x for any type and shape."""
    return _save(path, [helper.make_node("Identity", ["x"], ["y"])], [], element, shape)


def renamed_output(path: Path) -> Path:
    """Like `raises_unless_zero`, but its output is called z."""
    table = numpy_helper.from_array(np.zeros(1, np.float32), "table")
    nodes = [
        helper.make_node("Cast", ["x"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["z"]),
    ]
    return _save(path, nodes, [table], output="z")


def weighted(folder: Path, number: float, shift: float, tensors: int = 3) -> tuple[bytes, bytes]:
    """y = x + number + shift: an ONNX file that holds `number`, and beside it weights whose last tensor is `shift`.

    The other tensors are random and always the same, 64 KiB each; nothing reads them. `shift` is 8 KiB.
    """
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)  # the onnx package would append to it
    chance = np.random.default_rng(1)
    fillers = [chance.standard_normal(16384, np.float32) for _ in range(tensors)]
    constants = [numpy_helper.from_array(np.array([number], np.float32), "number")]
    external = [numpy_helper.from_array(values, f"w{at}") for at, values in enumerate(fillers)]
    external.append(numpy_helper.from_array(np.full(2048, shift, np.float32), "shift"))
    for tensor in external:
        set_external_data(tensor, WEIGHTS_FILE)
    nodes = [
        helper.make_node("ReduceMax", ["shift"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "number"], ["sum"]),
        helper.make_node("Add", ["sum", "most"], ["y"]),
    ]
    path = _save(folder / "model.onnx", nodes, [*constants, *external])
    return path.read_bytes(), (folder / WEIGHTS_FILE).read_bytes()


def mapped(folder: Path, number: float) -> tuple[bytes, bytes]:
    """y = x + number, the number in a file of its own, which the engine maps into memory instead of reading it."""
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)  # the onnx package would append to it
    numbers = numpy_helper.from_array(np.full((4096, 4), number, np.float32), "numbers")
    set_external_data(numbers, WEIGHTS_FILE)
    nodes = [
        helper.make_node("ArgMax", ["x"], ["most"], axis=1, keepdims=0),
        helper.make_node("Gather", ["numbers", "most"], ["found"]),
        helper.make_node("Add", ["x", "found"], ["y"]),
    ]
    path = _save(folder / "model.onnx", nodes, [numbers])
    return path.read_bytes(), (folder / WEIGHTS_FILE).read_bytes()


def _save(
    path: Path,
    nodes: Sequence[NodeProto],
    constants: Sequence[TensorProto],
    element: int = TensorProto.FLOAT,
    shape: Sequence[int | str] = ("n", 4),
    output: str = "y",
    opset: int = OPSET,
) -> Path:
    inputs = [helper.make_tensor_value_info("x", element, shape)]
    outputs = [helper.make_tensor_value_info(output, element, shape)]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    save_model(model, path)
    return path


class HeldSession:
    """A real session whose runs wait while the engine is held. It remembers whether it was closed under a request."""

    def __init__(self, session: Session, engine: "HeldEngine") -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self._session, self._engine = session, engine
        self._running = 0
        self.closed = False

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        with self._engine.lock:
            self._running += 1
            self._engine.arrived += 1
            self._engine.rows.append(len(next(iter(feeds.values()))))
            self._engine.used_after_close |= self.closed
        try:
            assert self._engine.open.wait(60)
            time.sleep(self._engine.run_s)
            return self._session.run(feeds, outputs)
        finally:
            with self._engine.lock:
                self._running -= 1

    def stop(self, thread: int) -> None:
        self._session.stop(thread)

    def close(self) -> None:
        with self._engine.lock:
            self.closed = True
            self._engine.used_after_close |= self._running > 0
        self._session.close()


class HeldEngine(OrtEngine):
    """ONNX Runtime with a door: while `open` is cleared, requests stay inside their session, else for `run_s`."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.lock = threading.Lock()
        self.arrived = 0
        self.rows: list[int] = []
        """Of each run, in the order in which they began."""
        self.run_s = 0.0
        self.used_after_close = False
        self.sessions: list[HeldSession] = []

    def load(self, path: Path, beside: Beside = NOTHING) -> HeldSession:  # type: ignore[override]  # a Session
        session = HeldSession(super().load(path), self)
        self.sessions.append(session)
        return session


class Bench:
    """A model server on a folder of small models, with its telemetry."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.engine = HeldEngine()
        self.recorder = Recorder(0.0)
        self.server = ModelServer(self.engine, self.recorder, SystemClock(), **settings)

    async def put(
        self,
        version: str,
        make: Callable[[Path], Path],
        outputs: tuple[TensorSpec, ...] = Y,
        *,
        model: ModelName = MODEL,
        inputs: tuple[TensorSpec, ...] = X,
        serving: ServingTerms | None = None,
    ) -> None:
        """Make a model and switch to it, without committing."""
        path = make(self.folder / f"{model}-{version}.onnx")
        self.server.switch(await self.server.prepare(model, Version(version), path, inputs, outputs, serving=serving))

    async def add(self, number: int) -> None:
        """Serve `adder(number)` as version `number`, committed."""
        await self.put(str(number), lambda path: adder(path, number))
        await self.server.commit(MODEL)

    async def ask(self, value: float = 1.0, version: str | None = None) -> tuple[float, str]:
        """One request; the number in the answer (which must be the same in all places) and the version."""
        feeds = {"x": np.full((2, 4), value, np.float32)}
        answer = await self.server.infer(MODEL, Version(version) if version else None, feeds)
        (number,) = set((answer.outputs["y"] - value).flat)
        return float(number), answer.version

    def versions(self) -> list[str]:
        return [served.version for served in self.server.models()]
