"""New weights for a session that runs: each request sees one version of them, and an update is like any other."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model

from common.ids import Digest, ModelName
from edge_agent.inference.engine import NOTHING, Beside, Session
from edge_agent.inference.live import LiveModels
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.ort import OrtEngine, OrtSession
from tests.integration.agent_bench import device_at
from tests.integration.release_desk import MODEL, ReleaseDesk

NAME = ModelName("heads")
PLENTY = 10**12


def heads(folder: Path, one: float, two: float, fixed: float = 0.0, offered: tuple[str, ...] = ("one", "two")) -> Path:
    """y = x + fixed + one, z = x + two. The initializers `offered` are inputs of the graph as well."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "one": np.full(4, one, np.float32),
        "two": np.full(4, two, np.float32),
        "fixed": np.full(4, fixed, np.float32),
    }
    nodes = [
        helper.make_node("Add", ["x", "fixed"], ["sum"]),
        helper.make_node("Add", ["sum", "one"], ["y"]),
        helper.make_node("Add", ["x", "two"], ["z"]),
    ]
    tensor = helper.make_tensor_value_info
    inputs = [tensor("x", TensorProto.FLOAT, ["n", 4]), *(tensor(name, TensorProto.FLOAT, [4]) for name in offered)]
    outputs = [tensor(name, TensorProto.FLOAT, ["n", 4]) for name in ("y", "z")]
    constants = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = helper.make_graph(nodes, "heads", inputs, outputs, constants)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    return folder / "m.onnx"


class Counting(OrtEngine):
    """ONNX Runtime that counts its loads and keeps its sessions."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[OrtSession] = []

    def load(self, path: Path, beside: Beside = NOTHING) -> OrtSession:
        self.sessions.append(super().load(path, beside))
        return self.sessions[-1]


def ask(session: Session, x: float = 1.0) -> tuple[float, float]:
    found = session.run({"x": np.full((1, 4), x, np.float32)}, ["y", "z"])
    return float(found["y"][0, 0]), float(found["z"][0, 0])


def test_a_release_that_differs_in_such_weights_only_needs_no_load(tmp_path: Path) -> None:
    live, engine = LiveModels(), Counting()
    first = live.load(NAME, heads(tmp_path / "1", 10, 100), engine.load)
    assert live.suits(NAME, heads(tmp_path / "2", 20, 100))
    second = live.load(NAME, heads(tmp_path / "2", 20, 100), engine.load)
    third = live.load(NAME, heads(tmp_path / "3", 20, 300), engine.load)
    assert len(engine.sessions) == 1
    assert [ask(session) for session in (first, second, third)] == [(11, 101), (21, 101), (21, 301)]
    first.close()
    second.close()
    assert ask(third) == (21, 301), "it stands on what the first one loaded"
    third.close()
    assert not hasattr(engine.sessions[0], "_session"), "the last one out closes it"
    assert not live.suits(NAME, heads(tmp_path / "2", 20, 100))


def test_a_file_that_is_loaded_again_is_read_again(tmp_path: Path) -> None:
    live, engine, path = LiveModels(), Counting(), heads(tmp_path / "1", 10, 100)
    first = live.load(NAME, path, engine.load)
    again = live.load(NAME, path, engine.load)
    assert len(engine.sessions) == 2, "what the first one has mapped may have been read while it was bad"
    first.close()
    assert ask(again) == (11, 101)


def test_anything_else_that_differs_is_loaded_in_full(tmp_path: Path) -> None:
    live, engine = LiveModels(), Counting()
    live.load(NAME, heads(tmp_path / "1", 10, 100), engine.load)
    for other in (
        heads(tmp_path / "fixed", 10, 100, fixed=1),
        heads(tmp_path / "offered", 10, 200, offered=("one",)),
    ):
        assert not live.suits(NAME, other)
    closed = LiveModels()
    closed.load(NAME, heads(tmp_path / "a", 1, 2, offered=()), engine.load)
    assert not closed.suits(NAME, heads(tmp_path / "b", 1, 3, offered=())), (
        "weights that nobody can give are in the graph"
    )


def test_the_answers_are_those_of_a_full_load(tmp_path: Path) -> None:
    cache = OptimisedModels(
        tmp_path / "o", OrtEngine(), bytes_max=PLENTY, reserve_bytes=0, free=lambda _: PLENTY, model_bytes_min=0
    )
    live = LiveModels()
    live.load(NAME, heads(tmp_path / "1", 10, 100), lambda path: cache.load(NAME, path, Digest("sha256:" + "1" * 64)))
    path = heads(tmp_path / "2", 0.1, -7)
    fed, full = live.load(NAME, path, OrtEngine().load), OrtEngine().load(path)
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 4), np.float32)}
    for name, array in full.run(feeds, ["y", "z"]).items():
        np.testing.assert_array_equal(fed.run(feeds, ["y", "z"])[name], array)


def test_no_request_sees_weights_of_two_releases(tmp_path: Path) -> None:
    live, engine = LiveModels(), Counting()
    serving = [live.load(NAME, heads(tmp_path / "0", 0, 0), engine.load)]
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            seen.append(ask(serving[-1], 0.0))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 60):
        serving.append(live.load(NAME, heads(tmp_path / str(number), number, number), engine.load))
    done.set()
    for thread in threads:
        thread.join()
    assert all(one == two for one, two in seen)
    assert len(engine.sessions) == 1


@pytest.mark.parametrize("good", [True, False])
async def test_such_an_update_is_proven_or_taken_back_like_any_other(tmp_path: Path, good: bool) -> None:
    desk, engine = ReleaseDesk(), Counting()
    await desk.start()
    one = heads(tmp_path / "1", 1, 1).read_bytes()
    two = heads(tmp_path / "2", 2 if good else np.nan, 2).read_bytes()
    async with device_at(tmp_path / "device", desk, engine=engine) as device:

        async def answer() -> float:
            found = await device.server.infer(MODEL, None, {"x": np.zeros((1, 4), np.float32)})
            return float(found.outputs["y"][0, 0])

        await device.executor.accept(desk.order(desk.release("1", one)))
        assert (await device.finished(1)).outcome == "succeeded"
        await device.executor.accept(desk.order(desk.release("2", two)))
        assert (await device.finished(2)).outcome == ("succeeded" if good else "failed")
        assert await asyncio.gather(*(answer() for _ in range(3))) == [2.0 if good else 1.0] * 3
        assert len(engine.sessions) == 1
    await desk.stop()
