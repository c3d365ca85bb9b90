"""What a shadow trial sums up, and the verdict on it: little agreement fails, too little to see says nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.wire import Shadow, ShadowReport
from edge_agent.inference.agreement import Agreement, Compared, answers_agree
from edge_agent.update.shadow import in_words, judged

CLOSE, TOP1 = Shadow(for_s=1, rtol=0.1, atol=0.0), Shadow(for_s=1, agree="top1")
SECONDS = st.none() | st.floats(0, 10)
COMPARISONS = st.lists(st.builds(Compared, SECONDS, SECONDS, st.booleans()), max_size=30)


@given(comparisons=COMPARISONS, dropped=st.integers(0, 5))
def test_the_sums_are_those_of_the_comparisons(comparisons: list[Compared], dropped: int) -> None:
    total = Agreement()
    for one in comparisons:
        total = total.plus(one)
    found = total.report(dropped)
    answered = [one for one in comparisons if one.live_s is not None]
    both = [one for one in answered if one.candidate_s is not None]
    assert (found.samples, found.agreed) == (len(answered), sum(one.agrees for one in both))
    assert found.live.requests == found.candidate.requests == len(comparisons)
    assert found.live.errors == len(comparisons) - len(answered)
    assert found.candidate.errors == sum(one.candidate_s is None for one in comparisons)
    assert (found.dropped, found.verdict) == (dropped, "unjudged")
    assert (found.live.latency_s is None) == (not answered)
    assert (found.agreement is None) == (not answered)


@given(samples=st.integers(0, 100), agreed=st.integers(0, 100), least=st.integers(1, 100), ask=st.floats(0.01, 1))
def test_no_data_is_never_a_pass_and_never_a_fail(samples: int, agreed: int, least: int, ask: float) -> None:
    terms = Shadow(for_s=1, agreement_min=ask, samples_min=least)
    found = judged(terms, ShadowReport(samples=samples, agreed=min(agreed, samples)))
    assert (found.verdict == "inconclusive") == (samples < least)
    if samples >= least:
        assert (found.verdict == "pass") == (min(agreed, samples) >= ask * samples)


@given(samples=st.integers(0, 100))
def test_without_a_bound_nothing_is_judged(samples: int) -> None:
    verdict = judged(Shadow(for_s=1, samples_min=50), ShadowReport(samples=samples)).verdict
    assert verdict == ("inconclusive" if samples < 50 else "unjudged")


def test_the_words_give_the_numbers() -> None:
    terms = Shadow(for_s=1, agreement_min=0.95)
    words = in_words(terms, judged(terms, ShadowReport(samples=200, agreed=120)))
    assert "120 of 200 live requests" in words
    assert "0.95 is asked for" in words
    few = in_words(terms, judged(terms, ShadowReport(samples=3, dropped=9)))
    assert few == "3 live requests were compared, 9 found no free core; a judgement takes 20"


@pytest.mark.parametrize(
    ("terms", "live", "candidate", "agree"),
    [
        (CLOSE, np.array([1.0, 2.0]), np.array([1.05, 2.1]), True),
        (CLOSE, np.array([1.0, 2.0]), np.array([1.05, 2.3]), False),
        (CLOSE, np.array([1.0, 2.0]), np.array([[1.0, 2.0]]), False),
        (CLOSE, np.array([100]), np.array([101]), False),
        (CLOSE, np.array(["cat"], object), np.array(["cat"], object), True),
        (CLOSE, np.array([True]), np.array([False]), False),
        (CLOSE, np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), True),
        (TOP1, np.array([[0.1, 0.9]]), np.array([[0.4, 0.6]]), True),
        (TOP1, np.array([[0.1, 0.9]]), np.array([[0.6, 0.4]]), False),
        (TOP1, np.array([[0.1]]), np.array([[0.5]]), False),
        (TOP1, np.array(1.0), np.array(1.001), True),
        (TOP1, np.array([3]), np.array([4]), False),
    ],
)
def test_floats_are_near_or_have_the_same_top_and_the_rest_is_equal(
    terms: Shadow, live: np.ndarray, candidate: np.ndarray, agree: bool
) -> None:
    assert answers_agree(terms, {"y": live}, {"y": candidate}) is agree


def test_an_answer_with_other_outputs_does_not_agree() -> None:
    assert not answers_agree(CLOSE, {"y": np.ones(1)}, {"z": np.ones(1)})
