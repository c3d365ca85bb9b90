"""What a new release is warmed on is what the one before it ran."""

from pathlib import Path

import numpy as np
from onnx import TensorProto

from common.artifact import TensorSpec
from edge_agent.inference.loaded import Runs
from edge_agent.inference.scheduling import BATCH_BYTES_MAX
from edge_agent.inference.tensors import synthetic
from edge_agent.inference.warming import SIZES_MAX, sizes_in_use, warm
from tests.integration.small_models import MODEL, Bench, X, Y, adder, identity


def ran(*sizes: tuple[int, int]) -> list[Runs]:
    return [Runs(rows, count, 0.1) for rows, count in sizes]


def test_the_busiest_sizes_come_first_and_rare_ones_are_left_out() -> None:
    assert sizes_in_use(ran((1, 50), (4, 500), (16, 300), (64, 1)), row_bytes=1) == (16, 4)


def test_single_rows_need_nothing_more() -> None:
    assert sizes_in_use(ran((1, 1000)), row_bytes=1) == ()
    assert sizes_in_use([], row_bytes=1) == ()


def test_their_number_and_their_bytes_are_bounded() -> None:
    many = ran(*((rows, 100) for rows in range(30, 65)))
    assert len(sizes_in_use(many, row_bytes=1)) == SIZES_MAX
    assert sizes_in_use(ran((8, 10), (64, 10)), row_bytes=BATCH_BYTES_MAX // 8) == (8,)


async def test_a_switch_finds_the_new_release_warm_on_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.add(1)
    for rows in (3, 3, 3, 5):
        await bench.server.infer(MODEL, None, {"x": np.ones((rows, 4), np.float32)})
    bench.engine.rows.clear()
    await bench.add(2)
    assert bench.engine.rows == [1, 1, 3, 5]
    await bench.server.close()


def test_a_model_without_rows_is_left_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    session = bench.engine.load(adder(tmp_path / "a.onnx", 1))
    fixed = TensorSpec("x", "FP32", (2, 4)), TensorSpec("y", "FP32", (2, 4))
    assert warm(session, fixed[:1], fixed[1:], synthetic(fixed[:1]), ran((8, 9))) == 0
    assert bench.engine.rows == []
    session.close()


def test_a_batch_that_fails_is_no_verdict(tmp_path: Path) -> None:
    one_row_only = identity(tmp_path / "i.onnx", TensorProto.FLOAT, (1, 4))
    bench = Bench(tmp_path)
    session = bench.engine.load(one_row_only)
    assert warm(session, X, Y, synthetic(X), ran((8, 9))) == 1
    assert bench.engine.rows == [8]
    session.close()
