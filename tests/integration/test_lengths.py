"""Competing requests of different lengths on the real engine: padded where the release allows it and nobody notices."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model

from common.artifact import TensorSpec
from common.artifact.serving import Padding, ServingTerms
from common.artifact.tensors import Array
from edge_agent.inference.lengths import PADDED_TRIALS
from tests.conftest import eventually
from tests.integration.small_models import IR_VERSION, MODEL, Bench

INPUTS = (TensorSpec("x", "FP32", (-1, -1)), TensorSpec("mask", "FP32", (-1, -1)))
OUTPUTS = (TensorSpec("each", "FP32", (-1, -1)), TensorSpec("mean", "FP32", (-1, -1)))
PADDED = ServingTerms(padding={"x": Padding(axis=1, value=9.0, mask="mask")})
NEAR = (20, 22, 24, 21)


def masked_mean(path: Path, *, masked: bool = True) -> Path:
    """each = x + mean, mean [n, 1] = the mean of x over the length, of what the mask says if `masked`."""
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    nodes = [
        helper.make_node("Mul", ["x", "mask"], ["real"]),
        helper.make_node("ReduceSum", ["real", "axes"], ["total"], keepdims=1),
        helper.make_node("ReduceSum", ["mask", "axes"], ["marked"], keepdims=1),
        helper.make_node("Max", ["marked", "one"], ["count"]),
        helper.make_node("Div", ["total", "count"], ["mean"])
        if masked
        else helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Add", ["x", "mean"], ["each"]),
    ]
    shape = ["n", "length"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "mask")]
    outputs = [
        helper.make_tensor_value_info("each", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", "m"]),
    ]
    graph = helper.make_graph(nodes, "lengths", inputs, outputs, [axes, one])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=IR_VERSION), path)
    return path


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, workers=1, queue=64)
    bench.engine.run_s = 0.003  # for any number of rows: batches pay
    yield bench
    bench.engine.open.set()
    await bench.server.close()


async def serve(bench: Bench, make: Callable[[Path], Path], serving: ServingTerms | None = PADDED) -> None:
    await bench.put("1", make, OUTPUTS, inputs=INPUTS, serving=serving)
    await bench.server.commit(MODEL)


def values(length: int) -> Array:
    return np.random.default_rng(length).standard_normal((1, length)).astype(np.float32)


async def ask(bench: Bench, length: int, outputs: list[str] | None = None) -> dict[str, Array]:
    x = values(length)
    return (await bench.server.infer(MODEL, None, {"x": x, "mask": np.ones_like(x)}, outputs)).outputs


async def burst(bench: Bench, *lengths: int, outputs: list[str] | None = None) -> None:
    """Requests of these lengths that compete; each must get its own answer."""
    before = bench.engine.arrived
    bench.engine.open.clear()
    first = asyncio.create_task(ask(bench, 7))
    await eventually(lambda: bench.engine.arrived > before, "the only core is busy")
    tasks = [asyncio.create_task(ask(bench, length, outputs)) for length in lengths]
    await asyncio.sleep(0.01)
    bench.engine.rows.clear()
    bench.engine.open.set()
    await first
    for length, answer in zip(lengths, await asyncio.gather(*tasks), strict=True):
        mean = values(length).mean(axis=1, keepdims=True)
        expected = {"each": values(length) + mean, "mean": mean}
        assert list(answer) == (outputs or ["each", "mean"])
        for name, array in answer.items():
            assert array.shape == expected[name].shape
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


def standing(bench: Bench) -> str:
    (kept,) = bench.server.kept_terms()
    return kept.padding


async def stands(bench: Bench, what: str) -> None:
    """Trials are made after the answers were given."""
    await eventually(lambda: standing(bench) == what, what)


async def test_lengths_are_tried_on_real_requests_and_then_run_together(bench: Bench) -> None:
    await serve(bench, masked_mean)
    for number in range(PADDED_TRIALS):
        await stands(bench, f"on trial, {number} of {PADDED_TRIALS} passed")
        await burst(bench, *NEAR)
        together = [1, 1, 1, 1, 4]
        await eventually(lambda: bench.engine.rows == together, "each alone, then once more together to compare")  # noqa: B023
    await stands(bench, "used")
    sizes = []
    for _ in range(20):
        await burst(bench, *NEAR)
        sizes += bench.engine.rows
    assert max(sizes) > 1


async def test_a_model_that_takes_the_padding_for_input_is_found_out_and_answers_right(bench: Bench) -> None:
    await serve(bench, lambda path: masked_mean(path, masked=False))
    for _ in range(PADDED_TRIALS + 3):
        await burst(bench, *NEAR)
    assert set(bench.engine.rows) == {1}
    await stands(bench, "off: a request of length 20 is answered otherwise when it is padded to 24")
    sizes = []
    for _ in range(8):
        await burst(bench, 20, 20, 20, 22)
        sizes += bench.engine.rows
    assert max(sizes) in {2, 3}, "equal lengths are batched as ever"


async def test_without_the_releases_word_nothing_is_padded(bench: Bench) -> None:
    await serve(bench, masked_mean, None)
    for _ in range(PADDED_TRIALS + 3):
        await burst(bench, *NEAR)
        assert set(bench.engine.rows) == {1}


async def test_far_lengths_do_not_go_together(bench: Bench) -> None:
    await serve(bench, masked_mean)
    for _ in range(PADDED_TRIALS + 3):
        await burst(bench, 10, 20, 40, 80)
        assert set(bench.engine.rows) == {1}


async def test_an_output_that_was_not_tried_is_tried_before_it_is_answered_padded(bench: Bench) -> None:
    await serve(bench, masked_mean)
    for _ in range(PADDED_TRIALS + 2):
        await burst(bench, *NEAR, outputs=["mean"])
    await burst(bench, *NEAR, outputs=["each"])
    await eventually(lambda: bench.engine.rows == [1, 1, 1, 1, 4], "on trial for this output")
    for _ in range(PADDED_TRIALS + 5):
        await burst(bench, *NEAR, outputs=["each"])


async def test_equal_lengths_are_batched_as_ever_while_padding_is_on_trial(bench: Bench) -> None:
    await serve(bench, masked_mean)
    sizes = []
    for _ in range(12):
        await burst(bench, 20, 20, 20, 20)
        sizes += bench.engine.rows
    assert max(sizes) > 1
    await stands(bench, f"on trial, 0 of {PADDED_TRIALS} passed")
    await burst(bench, 20, 20, 24, 24)
    await stands(bench, f"on trial, 1 of {PADDED_TRIALS} passed")


async def test_a_batch_never_has_more_bytes_than_the_device_allows(tmp_path: Path) -> None:
    row = 2 * 24 * 4 + (24 + 1) * 4
    bench = Bench(tmp_path, workers=1, queue=64, batch_bytes_max=2 * row)
    await serve(bench, masked_mean)
    sizes = []
    for _ in range(20):
        await burst(bench, *[24] * 8)
        sizes += bench.engine.rows
    assert set(sizes) == {1, 2}
    await bench.server.close()
