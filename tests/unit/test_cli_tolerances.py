"""Tolerances and latencies as a publisher types them."""

import pytest

from common.artifact import TensorSpec
from common.artifact.selftest import Close, Exact, Rule, Top1
from common.errors import InvalidInput
from controller.cli.tolerances import Tolerance, check_names, parse_latencies, parse_tolerance, rule_for

SCORES, LABEL = TensorSpec("scores", "FP32", (-1, 4)), TensorSpec("label", "INT64", (-1,))


NO_RULE = ("", "top1,atol=1", "exact,top1", "output=x", "nearly", "slack=1")
NO_BOUND = ("atol=", "atol", "atol=-1", "atol=nan", "atol=1e999", "atol=1,atol=2")


def rule(spec: TensorSpec, *texts: str, variant: str = "default", largest: float = 1.0) -> Rule:
    return rule_for([parse_tolerance(text) for text in texts], variant, spec, largest)


def test_a_tolerance_says_how_and_where() -> None:
    assert parse_tolerance("rtol=1e-3,atol=0.5") == Tolerance(rtol=0.001, atol=0.5)
    assert parse_tolerance("variant=int8, output=a=b:0, top1") == Tolerance(variant="int8", output="a=b:0", word="top1")


@pytest.mark.parametrize("text", [*NO_RULE, *NO_BOUND])
def test_what_is_no_tolerance_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_tolerance(text)
    assert refused.value.field == "tolerance"


def test_without_a_word_floats_are_close_by_their_magnitude_and_the_rest_is_exact() -> None:
    assert rule(SCORES) == Close(rtol=1e-3, atol=1e-4)
    assert rule(SCORES, largest=50.0) == Close(rtol=1e-3, atol=5e-3)
    assert rule(SCORES, largest=0.0) == Close(rtol=1e-3, atol=1e-4)
    assert rule(TensorSpec("half", "FP16", (1,))) == Close(rtol=1e-2, atol=1e-2)
    for datatype in ("INT64", "UINT8", "BOOL", "BYTES"):
        assert rule(TensorSpec("y", datatype, (1,))) == Exact()


def test_what_names_more_wins_and_then_what_comes_later() -> None:
    assert rule(SCORES, "atol=1", "atol=2") == Close(rtol=1e-3, atol=2)
    assert rule(SCORES, "output=scores,top1", "atol=2") == Top1()
    assert rule(SCORES, "variant=int8,top1", "rtol=0.1", variant="int8") == Top1()
    assert rule(SCORES, "variant=int8,top1", "rtol=0.1") == Close(rtol=0.1, atol=1e-4)
    assert rule(SCORES, "output=other,exact") == Close(rtol=1e-3, atol=1e-4)


def test_only_a_name_loosens_what_is_exact() -> None:
    assert rule(LABEL, "atol=1", "top1") == Exact()
    assert rule(LABEL, "output=label,atol=1,rtol=0") == Close(rtol=0, atol=1)


def test_names_that_do_not_exist_are_refused() -> None:
    outputs = {"default": ("scores",), "int8": ("scores", "label")}
    check_names([parse_tolerance("output=label,exact"), parse_tolerance("variant=int8,top1")], outputs)
    for text in ("variant=fp16,top1", "output=logits,top1", "variant=default,output=label,top1"):
        with pytest.raises(InvalidInput, match="there is no"):
            check_names([parse_tolerance(text)], outputs)


def test_latencies_are_for_all_variants_or_for_one() -> None:
    assert parse_latencies((), ["default"]) == {}
    assert parse_latencies(("0.2", "int8=0.1"), ["default", "int8"]) == {"default": 0.2, "int8": 0.1}
    assert parse_latencies(("int8=0.1", "0.2"), ["default", "int8"]) == {"default": 0.2, "int8": 0.1}
    for text in ("0", "-1", "fast", "inf", "3601", "fp16=1", "="):
        with pytest.raises(InvalidInput):
            parse_latencies((text,), ["default"])
