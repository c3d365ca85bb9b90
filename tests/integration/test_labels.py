"""True labels over HTTP and in the library: each is counted once, for the release that gave the answer."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.clock import SystemClock
from common.errors import InvalidInput, NotFound
from common.ids import ModelName, Version
from edge_agent import Device
from edge_agent.identity import save_identity
from edge_agent.inference.http import inference_app
from edge_agent.inference.labels import ANSWERS_MAX, BYTES_MAX, ROWS_MAX, Label, Labels
from edge_agent.inference.listening import listen
from edge_agent.inference.requests import Inference
from edge_agent.telemetry.recorder import Recorder
from tests.conftest import eventually
from tests.integration.release_desk import MODEL as DESK_MODEL
from tests.integration.release_desk import ReleaseDesk
from tests.integration.small_agent import identity_at
from tests.integration.small_models import MODEL, Bench, adder

M, ONE, TWO = ModelName("m"), Version("1"), Version("2")


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class Memory:
    """Labels with their recorder and clock."""

    def __init__(self, kept_s: float = 60.0) -> None:
        self.recorder = Recorder(0.0)
        self.clock = Hand()
        self.labels = Labels(self.recorder, self.clock, kept_s)

    def answer(self, name: str, *outputs: Any, version: Version = ONE) -> None:
        arrays = {f"y{number}": np.asarray(output) for number, output in enumerate(outputs)}
        self.labels.remember(M, name, Inference(arrays, version, M))

    def label(self, name: str, value: Any, version: Version | None = None, **more: Any) -> tuple[int, int, int]:
        done = self.labels.label(M, version, [Label(id=name, label=value, **more)])
        return done.labelled, done.correct, done.repeated

    def counts(self) -> dict[str, tuple[int, int]]:
        return {window.version: (window.labelled, window.correct) for window in self.recorder.cut(1.0)}


def test_a_class_a_value_and_a_text_are_compared_as_what_they_are() -> None:
    memory = Memory()
    memory.answer("scores", np.array([[0.1, 0.7, 0.2], [0.9, 0.1, 0.0]], np.float32))
    memory.answer("class", np.array([7]))
    memory.answer("text", np.array(["cat"], object))
    memory.answer("yes", np.array([True]))
    memory.answer("number", np.array([[1.5]], np.float32))
    assert memory.label("scores", (1, 2)) == (2, 1, 0)
    assert memory.label("class", 7) == (1, 1, 0)
    assert memory.label("text", "dog") == (1, 0, 0)
    assert memory.label("yes", True) == (1, 1, 0)
    assert memory.label("number", 1.6, tolerance=0.2) == (1, 1, 0)
    assert memory.counts() == {"1": (6, 4)}


def test_each_answer_is_counted_once_for_the_release_that_gave_it() -> None:
    memory = Memory()
    memory.answer("a", [3])
    memory.answer("b", [3], version=TWO)
    assert memory.label("a", 3) == (1, 1, 0)
    assert memory.label("a", 4) == (0, 0, 1)
    assert memory.label("b", 4) == (1, 0, 0)
    both = memory.labels.label(M, None, [Label(id="b", label=4), Label(id="a", label=3)])
    assert (both.labelled, both.repeated) == (0, 2)
    assert memory.counts() == {"1": (1, 1), "2": (1, 0)}
    memory.answer("a", [5])
    assert memory.label("a", 5) == (1, 1, 0), "the id was used again, for a new answer"


def test_an_id_twice_in_one_call_is_counted_once() -> None:
    memory = Memory()
    memory.answer("a", [3])
    done = memory.labels.label(M, None, [Label(id="a", label=3), Label(id="a", label=3)])
    assert (done.labelled, done.repeated) == (1, 1)


@pytest.mark.parametrize(
    ("label", "error", "words"),
    [
        (Label(id="nobody", label=1), NotFound, r"labels\[1\]\.id: no answer to the request 'nobody' is remembered"),
        (Label(id="rows", label=1), InvalidInput, r"labels\[1\]\.label: 1 values.*one for each row: 2"),
        (Label(id="rows", label=(1, "x")), InvalidInput, r"labels\[1\]\.label.*an integer"),
        (Label(id="rows", label=(1, 0.5)), InvalidInput, r"labels\[1\]\.label.*an integer"),
        (Label(id="text", label=1), InvalidInput, r"labels\[1\]\.label.*the answer is text"),
        (Label(id="number", label=1), InvalidInput, r"labels\[1\]\.tolerance.*how far off"),
        (Label(id="number", label="x", tolerance=1), InvalidInput, r"labels\[1\]\.label.*give a number"),
        (Label(id="number", label=10**400, tolerance=1), InvalidInput, r"labels\[1\]\.label.*give a number"),
        (Label(id="two", label=1), InvalidInput, r"labels\[1\]\.output.*name one of y0, y1"),
        (Label(id="two", label=1, output="z"), InvalidInput, r"labels\[1\]\.output: 'z'.*name one of y0, y1"),
        (Label(id="large", label=1), InvalidInput, r"labels\[1\]\.output.*at most 64 rows"),
    ],
)
def test_a_label_that_fits_no_answer_is_named_and_none_of_its_company_is_counted(
    label: Label, error: type[Exception], words: str
) -> None:
    memory = Memory()
    memory.answer("good", [1])
    memory.answer("rows", [1, 2])
    memory.answer("text", np.array(["a"], object))
    memory.answer("number", [0.5])
    memory.answer("two", [1], [2])
    memory.answer("large", np.zeros(ROWS_MAX + 1))
    with pytest.raises(error, match=words):
        memory.labels.label(M, None, [Label(id="good", label=1), label])
    assert memory.counts() == {}
    assert memory.label("good", 1) == (1, 1, 0)


def test_answers_are_forgotten_when_their_time_is_up_or_there_are_too_many() -> None:
    memory = Memory(kept_s=60.0)
    memory.answer("old", [1])
    memory.clock.at += 61
    memory.answer("young", [1])
    with pytest.raises(NotFound, match="older than 60 s"):
        memory.label("old", 1)
    for number in range(ANSWERS_MAX):
        memory.answer(f"more-{number}", [1])
    with pytest.raises(NotFound, match="no answer to the request 'young' is remembered"):
        memory.label("young", 1)
    assert memory.label("more-0", 1) == (1, 1, 0)
    with pytest.raises(NotFound, match="answered by version 1"):
        memory.label("more-1", 1, version=TWO)


def test_long_texts_are_forgotten_before_they_take_much_memory() -> None:
    memory = Memory()
    for number in range(9):
        memory.answer(f"{number}", np.array([chr(97 + number) * (BYTES_MAX // 8)], object))
    with pytest.raises(NotFound, match="'1'"):
        memory.label("1", "a")
    assert memory.label("2", "a") == (1, 0, 0)
    for _ in range(9):
        memory.answer("8", np.array(["b" * (BYTES_MAX // 8)], object))
    assert memory.label("2", "a") == (0, 0, 1), "an answer that was given anew takes its room once"
    memory.answer("more", np.array(["c" * (BYTES_MAX + 1)], object))
    with pytest.raises(NotFound, match="'more'"):
        memory.label("more", "c")
    assert memory.label("3", "d") == (1, 0, 0), "it did not drive the others out"


def test_nothing_is_remembered_without_an_id_or_where_labels_are_off() -> None:
    for memory, name in ((Memory(), ""), (Memory(), "x" * 129), (Memory(kept_s=0.0), "a")):
        memory.answer(name, [1])
        assert not memory.labels._answers


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=40))
def test_accuracy_is_that_of_the_first_label_of_each_answer(steps: list[tuple[int, int, bool]]) -> None:
    """Steps answer (True) or label one of six ids with one of four classes."""
    memory = Memory()
    given: dict[int, int] = {}
    labelled: set[int] = set()
    correct = total = 0
    for name, value, answers in steps:
        if answers:
            memory.answer(str(name), [value])
            given[name] = value
            labelled.discard(name)
        elif name in given:
            memory.label(str(name), value)
            if name not in labelled:
                total, correct = total + 1, correct + (given[name] == value)
            labelled.add(name)
    assert memory.counts() == ({"1": (total, correct)} if total else {})


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.put("1", lambda path: adder(path, 10))
    await bench.server.commit(MODEL)
    yield bench
    await bench.server.close()


async def test_labels_over_http_follow_the_answers_that_the_engine_gave(bench: Bench) -> None:
    labels = Labels(bench.recorder, SystemClock())
    listener = await listen(inference_app(bench.server, labels=labels), "127.0.0.1", 0)
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [0, 0, 9, 0, 7, 0, 0, 0]}
    model = f"{listener.url}/v2/models/{MODEL}"

    async with aiohttp.ClientSession() as http:

        async def post(path: str, body: Any) -> tuple[int, dict[str, Any]]:
            async with http.post(path, json=body) as response:
                return response.status, await response.json()

        status, answer = await post(f"{model}/infer", {"id": "parcel-1", "inputs": [tensor]})
        assert (status, answer["id"]) == (200, "parcel-1")
        right = {"labels": [{"id": "parcel-1", "label": [2, 1]}]}
        assert await post(f"{model}/labels", right) == (200, {"labelled": 2, "correct": 1, "repeated": 0})
        assert await post(f"{model}/versions/1/labels", right) == (200, {"labelled": 0, "correct": 0, "repeated": 1})
        for path, body, code, words in (
            ("labels", {"labels": [{"id": "parcel-2", "label": 1}]}, 404, "parcel-2"),
            ("versions/2/labels", right, 404, "answered by version 1"),
            ("labels", {"labels": []}, 400, "length >= 1"),
            ("labels", {"labels": [{"id": "parcel-1", "labl": 1}]}, 400, "labl"),
            ("labels", {"labels": [{"id": "parcel-1", "label": {}}]}, 400, "labels"),
        ):
            status, told = await post(f"{model}/{path}", body)
            assert (status, words in told["error"]) == (code, True), told
    (window,) = bench.recorder.cut(1.0)
    assert (window.labelled, window.correct) == (2, 1)
    await listener.close()


async def test_labels_in_the_library_count_for_the_real_model_that_answered(
    tmp_path: Path, real_models: tuple[Path, Path]
) -> None:
    desk = ReleaseDesk()
    await desk.start()
    desk.order(desk.release("1.0.0", real_models[0].read_bytes()))
    (tmp_path / "device").mkdir()
    save_identity(tmp_path / "device", identity_at(desk))
    device = Device(tmp_path / "device", inference_listen="127.0.0.1:0", disk_reserve_bytes="0", telemetry_s="3600")
    await asyncio.to_thread(device.start)
    await eventually(lambda: bool(device.models()), "the release is served")
    inputs = {"bytes": np.zeros((1, 2048), np.int32)}
    here = await asyncio.to_thread(device.infer, DESK_MODEL, inputs, request_id="a")
    await device.infer_async(DESK_MODEL, inputs, request_id="b")
    best = int(here.outputs["target_label"].argmax())
    assert device.label(DESK_MODEL, "a", best).correct == 1
    assert device.label(DESK_MODEL, "b", [best + 1]).correct == 0
    assert device.label(DESK_MODEL, "b", best).repeated == 1
    with pytest.raises(NotFound, match="'c' is remembered"):
        device.label(DESK_MODEL, "c", best)
    await asyncio.to_thread(device.close)
    await desk.stop()
