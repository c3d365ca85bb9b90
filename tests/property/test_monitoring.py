"""References, sketches and drift: every element is counted once, sketches add up, and scores mean what they say."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.artifact import TensorSpec
from common.artifact.tensors import Array
from common.errors import IntegrityFailure, InvalidInput
from common.ids import Digest
from common.monitoring.accuracy import accuracy
from common.monitoring.drift import Drift, drift_of, js_distance, psi, psi_by_chance, worst
from common.monitoring.making import make_reference
from common.monitoring.reference import (
    REFERENCE_BYTES_MAX,
    Classes,
    Reference,
    Values,
    check_reference,
    decode_reference,
    encode_reference,
)
from common.monitoring.sketch import FeatureCounts, Sketch, merged
from common.monitoring.sketching import ELEMENTS_MAX, count, pick

DIGEST = Digest("sha256:" + "a" * 64)
X = (TensorSpec("x", "FP32", (-1, 4)),)
SCORES = (TensorSpec("scores", "FP32", (-1, 5)),)
NOTHING: tuple[TensorSpec, ...] = ()

FLOATS = arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))
EDGES = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=12, unique=True).map(sorted)


def rows(chance: np.random.Generator, number: int, shift: float = 0.0) -> list[Array]:
    return [(chance.standard_normal((1, 4)) + shift).astype(np.float32) for _ in range(number)]


def reference_of(inputs: Sequence[Array], specs: tuple[TensorSpec, ...] = X) -> Reference:
    return make_reference(specs, NOTHING, [({specs[0].name: array}, {}) for array in inputs])


def sketch_of(reference: Reference, inputs: Sequence[Array]) -> Sketch:
    """All inputs, one request after another, as a device adds them up."""
    sketches = [
        Sketch(
            reference=DIGEST,
            observations=1,
            features=tuple(count(feature, pick(feature, array)) for feature in reference.features),
        )
        for array in inputs
    ]
    total = sketches[0]
    for sketch in sketches[1:]:
        total = merged(total, sketch)
    return total


def judged(reference: Reference, inputs: Sequence[Array]) -> Drift:
    return drift_of(reference, sketch_of(reference, inputs))


# Counting


@given(EDGES, FLOATS)
def test_every_number_there_is_falls_into_exactly_one_cell(edges: list[float], values: Array) -> None:
    feature = Values(tensor="x", side="input", edges=tuple(edges), counts=(0,) * (len(edges) + 3))
    counted = count(feature, values)
    assert len(counted.counts) == feature.cells
    assert sum(counted.counts) == values.size
    assert counted.counts[-2:] == (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    finite = values[np.isfinite(values)].astype(np.float64)
    for index, bound in enumerate(edges):
        assert sum(counted.counts[: index + 1]) == (finite <= bound).sum()
    assert (counted.low, counted.high) == ((finite.min(), finite.max()) if finite.size else (None, None))


@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=8, unique=True).map(sorted),
    arrays.arrays(np.int64, st.integers(0, 40), elements=st.integers(-12, 12)),
)
def test_every_class_has_its_cell_and_all_others_share_one(classes: list[int], values: Array) -> None:
    feature = Classes(tensor="y", side="output", classes=tuple(classes), counts=(0,) * (len(classes) + 1))
    *own, others = count(feature, values).counts
    assert own == [int((values == value).sum()) for value in classes]
    assert others == (~np.isin(values, classes)).sum()


@given(st.integers(1, 5000))
def test_elements_are_picked_from_all_over_a_tensor_and_never_more_than_the_limit(size: int) -> None:
    feature = Values(tensor="x", side="input", edges=(0.0,), counts=(0,) * 4)
    picked = pick(feature, np.arange(size))
    assert len(picked) == min(size, ELEMENTS_MAX)
    assert len(set(picked.tolist())) >= min(size, ELEMENTS_MAX) * 0.6
    if size > 2 * ELEMENTS_MAX:
        assert np.histogram(picked, bins=8, range=(0, size))[0].min() >= ELEMENTS_MAX // 8 - 3


def test_what_was_picked_does_not_change_with_the_callers_array() -> None:
    feature = Values(tensor="x", side="input", edges=(0.0,), counts=(0,) * 4)
    for size in (8, 5000):
        array = np.zeros(size)
        picked = pick(feature, array)
        array[:] = 7
        assert not picked.any()


def test_a_tensor_that_is_laid_out_otherwise_is_picked_alike() -> None:
    feature = Values(tensor="x", side="input", edges=(0.0,), counts=(0,) * 4)
    array = np.arange(6000.0).reshape(60, 100)
    np.testing.assert_array_equal(pick(feature, np.asfortranarray(array)), pick(feature, array))


SKETCHES = st.builds(
    lambda observations, cells, low, high: Sketch(
        reference=DIGEST, observations=observations, features=(FeatureCounts(tuple(cells), low, high),)
    ),
    st.integers(1, 100),
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.none() | st.floats(-9, 9),
    st.none() | st.floats(-9, 9),
)


@given(SKETCHES, SKETCHES, SKETCHES)
def test_sketches_add_up_in_any_order_and_grouping(one: Sketch, two: Sketch, three: Sketch) -> None:
    total = merged(merged(one, two), three)
    assert total == merged(one, merged(two, three)) == merged(merged(three, one), two)
    parts = [sketch.features[0] for sketch in (one, two, three)]
    assert total.observations == sum(sketch.observations for sketch in (one, two, three))
    assert total.features[0].counts == tuple(map(sum, zip(*(part.counts for part in parts), strict=True)))
    assert total.features[0].low == min((part.low for part in parts if part.low is not None), default=None)
    assert total.features[0].high == max((part.high for part in parts if part.high is not None), default=None)


def test_sketches_of_different_references_do_not_add_up() -> None:
    one = Sketch(reference=DIGEST, observations=1, features=(FeatureCounts((1,)),))
    other = Sketch(reference=Digest("sha256:" + "b" * 64), observations=1, features=(FeatureCounts((1,)),))
    with pytest.raises(ValueError, match="different references"):
        merged(one, other)


# References


@given(st.lists(FLOATS.map(lambda values: np.resize(values, 4).reshape(1, 4)), min_size=1, max_size=20))
def test_the_reference_counts_itself_and_nothing_of_it_lies_outside(inputs: list[Array]) -> None:
    if not any(np.isfinite(array).any() for array in inputs):
        with pytest.raises(InvalidInput, match="nothing to count"):
            reference_of(inputs)
        return
    reference = reference_of(inputs)
    (feature,) = reference.features
    assert isinstance(feature, Values)
    assert feature.counts == sketch_of(reference, inputs).features[0].counts
    assert (feature.counts[0], feature.counts[-3]) == (0, 0)
    assert decode_reference(encode_reference(reference)) == reference
    assert len(encode_reference(reference)) <= REFERENCE_BYTES_MAX


def test_bins_hold_a_tenth_each_classes_one_value_and_scores_their_largest() -> None:
    chance = np.random.default_rng(1)
    specs = (
        *X,
        TensorSpec("flags", "BOOL", (-1, 2)),
        TensorSpec("ids", "INT64", (-1, 9)),
        TensorSpec("t", "BYTES", (1,)),
    )
    samples = []
    for _ in range(400):
        inputs = {
            "x": chance.standard_normal((1, 4), np.float32),
            "flags": np.array([[True, bool(chance.integers(2))]]),
            "ids": chance.integers(0, 3000, (1, 9)),
            "t": np.array(["text"], object),
        }
        scores = chance.random((1, 5), np.float32)
        scores[0, 2] += 0.5
        samples.append((inputs, {"scores": scores}))
    reference = make_reference(specs, SCORES, samples)
    kinds = {(feature.tensor, type(feature), getattr(feature, "top", None)) for feature in reference.features}
    assert kinds == {
        ("scores", Classes, True), ("scores", Values, None), ("x", Values, None), ("flags", Classes, False),
        ("ids", Values, None),
    }  # fmt: skip
    by_tensor = {feature.tensor: feature for feature in reference.features if feature.side == "input"}
    assert by_tensor["x"].counts == (0, *[160] * 10, 0, 0, 0)
    assert by_tensor["flags"].counts[2] == 0
    top = next(feature for feature in reference.features if isinstance(feature, Classes) and feature.top)
    assert top.classes[int(np.argmax(top.counts))] == 2
    check_reference(reference, specs, SCORES)
    for shape in ((), (3,), (2, 0), (1, 2, 3)):
        assert pick(top, np.zeros(shape, np.float32)).size == 0, "an answer that is no table has no largest of each row"


def test_a_reference_of_tensors_that_the_model_lacks_is_refused() -> None:
    reference = reference_of(rows(np.random.default_rng(0), 40))
    for inputs in ((), (TensorSpec("x", "BYTES", (1,)),)):
        with pytest.raises(InvalidInput, match=r"features\[0\]"):
            check_reference(reference, inputs, SCORES)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b" " * (REFERENCE_BYTES_MAX + 1),
        b'{"format":1,"observations":9,"features":[]}',
        b'{"format":2,"observations":9,"features":[{"kind":"classes","tensor":"x","side":"input","classes":[1],"counts":[1,2]}]}',
        b'{"format":1,"observations":9,"features":[{"kind":"classes","tensor":"x","side":"input","classes":[1],"counts":[1]}]}',
        b'{"format":1,"observations":9,"features":[{"kind":"classes","tensor":"x","side":"input","classes":[2,1],"counts":[1,2,3]}]}',
        b'{"format":1,"observations":9,"features":[{"kind":"values","tensor":"x","side":"input","edges":[1,1],"counts":[1,2,3,4,5]}]}',
    ],
)  # fmt: skip
def test_other_bytes_are_no_reference(data: bytes) -> None:
    with pytest.raises(IntegrityFailure, match="no reference"):
        decode_reference(data)


# Judging

SHARES = st.lists(st.floats(0.01, 1), min_size=3, max_size=12).map(lambda parts: np.array(parts) / sum(parts))


@given(SHARES)
def test_equal_shares_score_nothing(shares: Array) -> None:
    assert psi(shares, shares) == js_distance(shares, shares) == 0


@given(SHARES, st.randoms())
def test_scores_are_symmetric_and_grow_with_the_distance(shares: Array, chance: "np.random.Generator") -> None:
    other = np.roll(shares, 1)
    assert math.isclose(psi(shares, other), psi(other, shares), abs_tol=1e-12)
    assert math.isclose(js_distance(shares, other), js_distance(other, shares), abs_tol=1e-9)
    assert 0 <= js_distance(shares, other) <= 1
    steps = [shares + part * (other - shares) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for score in (psi, js_distance):
        scores = [score(step, shares) for step in steps]
        assert all(lower <= higher + 1e-9 for lower, higher in pairwise(scores))


def test_the_score_grows_with_the_shift_of_the_data() -> None:
    chance = np.random.default_rng(3)
    reference = reference_of(rows(chance, 500))
    scores = [judged(reference, rows(chance, 500, shift)).features[0].psi or 0 for shift in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert scores == sorted(scores)
    assert scores[0] < 0.1 < 0.25 < scores[2]


def test_the_same_data_again_is_stable_and_scores_zero() -> None:
    inputs = rows(np.random.default_rng(3), 400)
    drift = judged(reference_of(inputs), inputs)
    assert (drift.verdict, drift.features[0].psi, drift.features[0].js_distance) == ("stable", 0.0, 0.0)


@pytest.mark.parametrize("observations", [1, 29])
def test_few_observations_say_nothing_however_far_off_they_are(observations: int) -> None:
    chance = np.random.default_rng(3)
    many, few = reference_of(rows(chance, 500)), reference_of(rows(chance, observations))
    for drift in (judged(many, rows(chance, observations, 50.0)), judged(few, rows(chance, 500, 50.0))):
        assert (drift.verdict, drift.features[0].psi) == ("inconclusive", None)


def test_thirty_observations_are_enough_for_other_data_and_not_for_the_same() -> None:
    chance = np.random.default_rng(3)
    reference = reference_of(rows(chance, 500))
    assert judged(reference, rows(chance, 30, 50.0)).verdict == "drifted"
    assert judged(reference, rows(chance, 30)).verdict == "inconclusive"


@pytest.mark.parametrize("observations", [30, 60, 150, 400, 2000])
def test_unchanged_data_is_hardly_ever_called_drifted(observations: int) -> None:
    """Independent elements in the reference's own shares, which is what the tests are about."""
    chance = np.random.default_rng(observations)
    cells = np.full(10, 0.1)
    verdicts = []
    for _trial in range(2000):
        counts = chance.multinomial(1000, cells), chance.multinomial(observations, cells)
        edges = tuple(float(edge) for edge in range(9))
        wanted, found = ((*map(int, one), 0, 0) for one in counts)
        feature = Values(tensor="x", side="input", edges=edges, counts=wanted)
        sketch = Sketch(reference=DIGEST, observations=observations, features=(FeatureCounts(found),))
        verdicts.append(drift_of(Reference(observations=1000, features=(feature,)), sketch).verdict)
    assert verdicts.count("drifted") <= 8, "2 are expected at most, of 2000 at one in a thousand"
    assert observations < 150 or verdicts.count("stable") > 1000


def test_the_bound_by_chance_is_the_quantile_of_chi_square() -> None:
    for cells, quantile in ((2, 10.828), (5, 18.467), (10, 27.877), (13, 32.909), (33, 62.487)):
        assert psi_by_chance(cells, 1, 1) / 2 == pytest.approx(quantile, rel=0.035)


def test_numbers_that_are_none_are_told_as_a_share_of_their_own() -> None:
    chance = np.random.default_rng(3)
    inputs = rows(chance, 400)
    reference = reference_of(inputs)
    for array in inputs[::2]:
        array[0, 0] = np.nan
    drift = judged(reference, inputs)
    assert drift.features[0].not_finite == 0.125
    assert drift.verdict == "drifted"


def test_a_release_that_always_answers_the_same_class_has_drifted() -> None:
    chance = np.random.default_rng(3)
    usual = [chance.random((1, 5), np.float32) for _ in range(400)]
    reference = make_reference((), SCORES, [({}, {"scores": scores}) for scores in usual])
    stuck = [np.sort(scores) for scores in usual]
    top = next(one for one in judged(reference, stuck).features if one.kind == "top1")
    assert top.verdict == "drifted"
    values = next(one for one in judged(reference, stuck).features if one.kind == "values")
    assert values.verdict == "stable", "the scores are the same numbers"


def test_the_worst_verdict_counts_and_nothing_is_no_pass() -> None:
    assert worst(["stable", "drifted", "inconclusive"]) == "drifted"
    assert worst(["stable", "inconclusive"]) == worst([]) == "inconclusive"
    assert worst(["stable", "stable"]) == "stable"


# Accuracy


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_an_interval_holds_the_share_narrows_with_labels_and_stays_within_bounds(right: int, wrong: int) -> None:
    one, many = accuracy(right, right + wrong), accuracy(100 * right, 100 * (right + wrong))
    if not right + wrong:
        assert (one.share, one.low, one.high) == (None, None, None)
        return
    assert one.share is not None and one.low is not None and one.high is not None
    assert many.low is not None and many.high is not None
    assert 0 <= one.low <= one.share + 1e-12 and one.share <= one.high + 1e-12 <= 1 + 1e-9
    assert many.high - many.low < one.high - one.low


def test_the_interval_is_wilsons() -> None:
    found = accuracy(9, 10)
    assert found.share == 0.9
    assert found.low == pytest.approx(0.59585, abs=1e-5)
    assert found.high == pytest.approx(0.98212, abs=1e-5)
