"""Chains of steps, and the steps that are part of the agent: what goes through and what is held against whom."""

import base64
import io
import threading
import time
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from common.artifact import TensorSpec
from common.artifact.pipeline import PARAMETERS_BYTES_MAX, Pipeline, PipelineStep, code_digest
from common.artifact.tensors import Array
from common.errors import InvalidInput
from common.ids import Digest
from common.pipelines import Chain, Guard, PluginMissing, StepFailed, open_chain
from common.pipelines.installed import code_of
from common.pipelines.step import Step

X = TensorSpec("x", "FP32", (-1, 4))
SCORES = (TensorSpec("scores", "FP32", (-1, 3)), TensorSpec("other", "INT64", (1,)))


def chain_of(name: str, specs: tuple[TensorSpec, ...], **parameters: Any) -> Chain:
    """One of the agent's own steps."""
    return open_chain([PipelineStep(plugin=name, version="1", parameters=parameters)], specs, code_of, Guard())


class Fixed:
    """A step that answers the same whatever it gets."""

    def __init__(self, answer: Any, outputs: tuple[TensorSpec, ...] = (X,)) -> None:
        self.inputs, self.outputs, self._answer = (X,), outputs, answer

    def apply(self, arrays: Mapping[str, Array]) -> Any:
        return self._answer(arrays) if callable(self._answer) else self._answer


def chain_with(step: Any, specs: tuple[TensorSpec, ...] = (X,), guard: Guard | None = None) -> Chain:
    """A chain of that step."""

    def find(_: PipelineStep) -> Any:
        def open_step(parameters: Mapping[str, Any], inputs: tuple[TensorSpec, ...]) -> Step:
            opened: Step = step
            return opened

        return open_step

    return open_chain([PipelineStep(plugin="edgeferry.any", version="1")], specs, find, guard or Guard())


ROWS = {"x": np.ones((2, 4), np.float32)}


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({}, "without an array 'x'"),
        (None, "without an array 'x'"),
        ({"x": [1.0]}, "without an array 'x'"),
        ({"x": np.ones((2, 4))}, r"FP64 \[2, 4\] as 'x', declared is FP32"),
        ({"x": np.ones((2, 5), np.float32)}, r"FP32 \[2, 5\] as 'x'"),
        (lambda arrays: 1 / 0, "raised ZeroDivisionError"),
        (lambda arrays: arrays["x"].fill(0), "raised ValueError"),
    ],
)
def test_a_step_that_does_not_do_what_it_declares_fails(answer: Any, complaint: str) -> None:
    with pytest.raises(StepFailed, match=complaint):
        chain_with(Fixed(answer)).run({"x": np.ones((2, 4), np.float32)})


def test_strings_that_are_none_fail() -> None:
    texts = TensorSpec("t", "BYTES", (1,))
    with pytest.raises(StepFailed, match="other things than strings"):
        chain_with(Fixed({"t": np.array([b"x"], object)}, (texts,))).run(ROWS)


def test_what_the_caller_did_wrong_is_told_to_the_caller() -> None:
    def refuse(_: object) -> None:
        raise InvalidInput("no picture", field="inputs.x")

    with pytest.raises(InvalidInput, match="no picture"):
        chain_with(Fixed(refuse)).run(ROWS)


@pytest.mark.parametrize("specs", [(), (TensorSpec("x", "FP64", (-1, 4)),), (TensorSpec("x", "FP32", (4,)),)])
def test_a_step_that_does_not_fit_its_place_is_not_opened(specs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(StepFailed, match="takes x FP32"):
        chain_with(Fixed({}), specs)


def test_what_no_step_takes_passes_by_and_is_not_overwritten() -> None:
    beside = TensorSpec("beside", "INT64", (1,))
    chain = chain_with(Fixed({"y": np.ones((1, 4), np.float32)}, (TensorSpec("y", "FP32", (-1, 4)),)), (X, beside))
    assert [spec.name for spec in chain.outputs] == ["y", "beside"]
    assert chain.run({**ROWS, "beside": np.array([7])})["beside"].tolist() == [7]
    with pytest.raises(StepFailed, match="where there is one of its name"):
        chain_with(Fixed({}, (beside,)), (X, beside))


@pytest.mark.parametrize("tries", range(20))
def test_a_loop_is_ended_in_its_thread_and_nowhere_else(tries: int) -> None:
    guard, begun = Guard(), threading.Event()

    def loop(_: object) -> None:
        begun.set()
        while True:
            pass

    chain, ended = chain_with(Fixed(loop), guard=guard), list[str]()

    def work() -> None:
        try:
            chain.run(ROWS)
        except StepFailed as error:
            ended.append(str(error))
        for _ in range(1000):  # an exception that came late would end this
            time.sleep(0)
        ended.append("went on")

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(10)
    for _ in range(5):
        guard.stop(thread.ident or 0)
    thread.join(10)
    assert ended == ["step edgeferry.any 1 took too long and was stopped", "went on"]
    guard.stop(threading.get_ident())  # is in no step


def test_the_best_classes_come_first_with_their_names() -> None:
    chain = chain_of("edgeferry.top_k", SCORES, input="scores", k=2, labels=["cat", "dog", "owl"])
    assert [(spec.name, spec.datatype, spec.shape) for spec in chain.outputs] == [
        ("top_indices", "INT64", (-1, 2)),
        ("top_scores", "FP32", (-1, 2)),
        ("top_labels", "BYTES", (-1, 2)),
        ("other", "INT64", (1,)),
    ]
    scores = np.array([[0.1, 0.9, 0.3], [2.0, 2.0, 1.0]], np.float32)
    found = chain.run({"scores": scores, "other": np.array([4])})
    assert found["top_labels"].tolist() == [["dog", "owl"], ["cat", "dog"]]
    np.testing.assert_array_equal(found["top_scores"], np.array([[0.9, 0.3], [2.0, 2.0]], np.float32))
    assert chain.row_wise


def test_softmax_makes_probabilities_of_large_scores() -> None:
    chain = chain_of("edgeferry.top_k", SCORES[:1], k=3, softmax=True)
    found = chain.run({"scores": np.array([[1000.0, 1000.0, -1000.0]], np.float32)})
    np.testing.assert_allclose(found["top_scores"], [[0.5, 0.5, 0.0]])


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"k": 4, "input": "scores"}, "4 of 3 classes"),
        ({"k": 0, "input": "scores"}, "Expected `int` >= 1"),
        ({"kay": 1}, "unknown field"),
        ({"k": 1}, "name one of other, scores"),
        ({"k": 1, "input": "other"}, "no tensor of scores"),
        ({"k": 1, "input": "scores", "labels": ["one"]}, "1 names for 3 classes"),
    ],
)
def test_parameters_that_cannot_be_are_named(parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StepFailed, match=complaint):
        chain_of("edgeferry.top_k", SCORES, **parameters)


def picture(colour: tuple[int, int, int], form: str = "PNG", size: tuple[int, int] = (5, 3)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_file_becomes_what_a_model_of_images_takes(form: str) -> None:
    chain = chain_of(
        "edgeferry.image",
        (TensorSpec("file", "UINT8", (-1,)),),
        width=4,
        height=2,
        output="image",
        mean=[0.5, 0.5, 0.5],
        std=[0.5],
    )
    assert chain.outputs == (TensorSpec("image", "FP32", (1, 3, 2, 4)),)
    found = chain.run({"file": np.frombuffer(picture((255, 0, 0), form), np.uint8)})["image"]
    np.testing.assert_allclose(found[0, :, 0, 0], [1.0, -1.0, -1.0], atol=0.02)
    assert not chain.row_wise


def test_several_files_come_as_base64_and_are_rows() -> None:
    specs = (TensorSpec("files", "BYTES", (-1,)),)
    chain = chain_of("edgeferry.image", specs, width=2, height=2, output="i", mode="L", datatype="UINT8", layout="nhwc")
    texts = [base64.b64encode(picture((grey, grey, grey))).decode() for grey in (10, 200)]
    found = chain.run({"files": np.array(texts, object)})["i"]
    assert (found.shape, str(found.dtype), found[:, 0, 0, 0].tolist()) == ((2, 2, 2, 1), "uint8", [10, 200])
    assert chain.row_wise
    assert chain.run({"files": np.array([], object)})["i"].shape == (0, 2, 2, 1)
    assert chain.run(chain.example())["i"].shape == (1, 2, 2, 1)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"no picture", picture((1, 2, 3))[:40]])
def test_a_file_that_is_no_picture_is_the_callers_fault(data: bytes) -> None:
    chain = chain_of("edgeferry.image", (TensorSpec("file", "UINT8", (-1,)),), width=4, height=2, output="image")
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        chain.run({"file": np.frombuffer(data, np.uint8)})


def test_a_small_file_that_says_it_is_huge_is_not_decoded() -> None:
    chain = chain_of("edgeferry.image", (TensorSpec("file", "UINT8", (-1,)),), width=4, height=2, output="image")
    huge = bytearray(picture((0, 0, 0)))
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    with pytest.raises(InvalidInput, match="pixels"):
        chain.run({"file": np.frombuffer(bytes(huge), np.uint8)})


def test_a_pipeline_names_code_for_what_is_not_built_in() -> None:
    with pytest.raises(ValueError, match="digest of the code"):
        PipelineStep(plugin="acme.add", version="1.0")
    with pytest.raises(ValueError, match="no code of its own"):
        PipelineStep(plugin="edgeferry.image", version="1", code=(Digest("sha256:" + "0" * 64),))
    with pytest.raises(ValueError, match="at most"):
        PipelineStep(plugin="edgeferry.image", version="1", parameters={"a": "x" * PARAMETERS_BYTES_MAX})
    with pytest.raises(ValueError, match="without a step"):
        Pipeline(model_inputs=(X,), model_outputs=(X,))
    with pytest.raises(PluginMissing, match="no version 9"):
        open_chain([PipelineStep(plugin="edgeferry.image", version="9")], (X,), code_of, Guard())


def test_the_digest_of_code_depends_on_names_and_bytes_and_not_on_their_order() -> None:
    one, two = ("a.py", b"1"), ("b.py", b"2")
    assert code_digest([one, two]) == code_digest([two, one])
    others = ([one], [("b.py", b"1"), ("a.py", b"2")], [one, two, ("c.py", b"")], [("a.py", b"12"), ("b.py", b"")])
    assert len({code_digest(files) for files in ([one, two], *others)}) == 5
    assert code_digest([("acme/__init__.py", b"")]).endswith("2d42311c")
