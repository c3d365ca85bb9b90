"""The parts of the delta benchmark that decide: the bound by counting, tensors found in files, goals, and the page."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from benchmarks.delta import bounds, goals, page, tensors
from benchmarks.delta.figures import BSDIFF4, OURS, XDELTA3, ZSTD_PATCH, Cost, Outcome, PairFigures
from benchmarks.delta.tensors import Tensor


def _tensor(values: NDArray[np.generic], dtype: str = "F32") -> Tensor:
    return Tensor(dtype, values.shape, values.tobytes())


def _bound_bytes(old: Tensor, new: Tensor) -> float:
    return bounds.bound({"w": old}, {"w": new}).bytes


def test_an_unchanged_tensor_costs_nothing() -> None:
    weights = _tensor(np.random.default_rng(5).standard_normal(1000).astype(np.float32))
    assert bounds.bound({"w": weights}, {"w": weights}) == (0.0, 0)


def test_a_fair_coin_for_each_weight_costs_a_bit_each() -> None:
    old = np.ones(8000, np.float32)
    new = np.where(np.arange(8000) % 2, old, np.nextafter(old, np.float32(2)))
    assert _bound_bytes(_tensor(old), _tensor(new)) == 1000


def test_what_the_old_exponent_tells_is_not_counted() -> None:
    old = np.where(np.arange(8000) % 2, 1, 4).astype(np.float32)
    new = np.where(old == 1, old, np.nextafter(old, np.float32(9)))
    assert _bound_bytes(_tensor(old), _tensor(new)) == 0


def test_a_difference_across_zero_is_small() -> None:
    tiny = np.float32(1e-45)
    old, new = (Tensor("F32", (1,), np.array([value], np.float32).tobytes()) for value in (-tiny, tiny))
    assert bounds.differences(old, new)[0].tolist() == [3]  # -tiny, -0, +0, +tiny


def test_integers_differ_modulo_their_width() -> None:
    old, new = (_tensor(np.array([value], np.int8), "I8") for value in (127, -128))
    assert bounds.differences(old, new)[0].tolist() == [1]


def test_noise_that_never_repeats_costs_about_its_bits() -> None:
    old = np.zeros(20_000, np.int32)
    new = np.random.default_rng(5).integers(0, 1 << 20, 20_000, np.int32)
    assert _bound_bytes(_tensor(old, "I32"), _tensor(new, "I32")) == pytest.approx(20_000 * 20 / 8, rel=0.01)


def test_a_tensor_without_an_old_self_is_told_apart() -> None:
    one, grown = (_tensor(np.zeros(shape, np.float32)) for shape in ((2, 3), (3, 3)))
    assert bounds.bound({"w": one}, {"w": grown, "v": one}) == (0.0, 36 + 24)


def test_tensors_of_a_graph_may_lie_inside_it_or_beside_it(tmp_path: Path) -> None:
    inside = helper.make_tensor("inside", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    outside = onnx.TensorProto(name="outside", data_type=onnx.TensorProto.INT8, dims=[3], data_location="EXTERNAL")
    for key, value in {"location": "weights.bin", "offset": "4", "length": "3"}.items():
        outside.external_data.add(key=key, value=value)
    graph = helper.make_graph([], "g", [], [], [inside, outside])
    (tmp_path / "old.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    (tmp_path / "old.bin").write_bytes(b"....abc")
    assert tensors.of_file(tmp_path / "old.onnx") == {"inside": _tensor(np.array([1, 2], np.float32))}
    assert tensors.of_file(tmp_path / "old.bin") == {"outside": Tensor("I8", (3,), b"abc")}


def test_tensors_of_safetensors_are_read_by_their_header(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    assert tensors.of_file(tmp_path / "m.safetensors") == {"w": Tensor("BF16", (1, 2), b"abcd")}


def _outcome(tool: str, size: int, apply_s: float = 0.1) -> Outcome:
    return Outcome(tool=tool, patch_bytes=size, create=Cost(1.0, 80.0), apply=Cost(apply_s, 45.0))


def _figures(name: str, *outcomes: Outcome, bound_bytes: float | None = None, new_bytes: int = 1000) -> PairFigures:
    return PairFigures(name=name, about="x", new_bytes=new_bytes, bound_bytes=bound_bytes, outcomes=outcomes)


def test_goals_are_judged_on_what_was_measured() -> None:
    crashed = Outcome(tool=BSDIFF4, problem="failed: out of memory")
    peers = (_outcome(ZSTD_PATCH, 440), _outcome(XDELTA3, 450, apply_s=0.5), crashed)
    rows = goals.goals([_figures("minilm-adam-10", _outcome(OURS, 260), *peers, bound_bytes=250, new_bytes=20_000_000)])
    judged = {row.what: (row.measured, row.met) for row in rows}
    assert judged["minilm-adam-10: ours over the bound"] == (1.04, False)
    assert judged["minilm-adam-10: smaller than the best peer"] == (440 / 260, True)
    assert judged["apply, fine-tunes, faster than xdelta3, worst pair (minilm-adam-10)"] == (5.0, True)
    assert judged["larger than the best simple way, worst pair (minilm-adam-10)"] == (260 - 440, True)


def test_a_goal_for_all_pairs_names_the_worst() -> None:
    some = [_figures(name, _outcome(OURS, size), _outcome(ZSTD_PATCH, 100)) for name, size in (("a", 90), ("b", 190))]
    row = next(row for row in goals.goals(some) if "simple way" in row.what)
    assert (row.what, row.measured, row.met) == ("larger than the best simple way, worst pair (b)", 90, False)


def test_the_page_shows_the_smallest_and_says_what_failed() -> None:
    crashed = Outcome(tool=BSDIFF4, problem="failed: out of memory")
    text = page.body([_figures("a", _outcome(OURS, 260), _outcome(ZSTD_PATCH, 440), crashed)], [])
    assert "| a | 1 000 | **26** |" in text
    assert "| ours | 260 | 26 | 1.00 | 0.100 | 80 | 45 |" in text
    assert "| bsdiff4 | failed: out of memory |" in text
