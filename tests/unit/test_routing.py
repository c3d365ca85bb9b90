"""Rules over a request: which wins, what they may know, and what a device without the expression language does."""

import sys
from typing import Any

import numpy as np
import pytest

from common.artifact.serving import Route
from common.ids import ModelName
from edge_agent.inference.routing import EXTRA, Ask, Decision, Load, compiled, decide

A, B = ModelName("a"), ModelName("b")
FEEDS: dict[str, Any] = {"ids": np.zeros((2, 7), np.int64), "": np.zeros(3, np.float16)}
ASK = Ask(Load(waiting=3, busy=2, cores=4), 5, FEEDS, {"n": 1, "flag": True, "long": "x" * 1000, "list": [1]})


def winner(*rules: tuple[str, ModelName], served: tuple[ModelName, ...] = (A, B)) -> Decision:
    return decide(compiled(Route(*rule) for rule in rules), ASK, lambda model: "" if model in served else "absent")


@pytest.mark.parametrize(
    "when",
    [
        "load.waiting == 3 && load.busy == 2 && load.cores == 4",
        "double(load.busy) / double(load.cores) == 0.5",
        "priority == 5",
        'input["ids"].shape == [2, 7] && input["ids"].datatype == "INT64"',
        'input[""].datatype == "FP16"',
        "input.exists(name, size(input[name].shape) == 1)",
        "parameters.n == 1 && parameters.flag",
        '!("long" in parameters) && !("list" in parameters)',
    ],
)
def test_what_a_rule_may_know(when: str) -> None:
    assert winner((when, A)) == Decision(0)


def test_the_first_that_holds_wins_and_who_cannot_answer_is_not_even_evaluated() -> None:
    assert winner(("false", A), ("true", A), ("true", B)) == Decision(1)
    assert winner(("priority / 0 == 1", A), ("true", B), served=(B,)) == Decision(1)
    assert winner(("parameters.absent == 1", A)) == Decision(None)


def test_a_rule_that_fails_is_told_of_and_the_next_is_tried() -> None:
    decision = winner(("priority / 0 == 1", A), ('priority == "a" || priority > "b"', A), ("true", B))
    assert decision.rule == 2
    assert [index for index, _ in decision.failed] == [0, 1]
    assert all(reason for _, reason in decision.failed)


@pytest.mark.parametrize("when", ["waiting > 1", "load.waiting >", "now() > 1", "(" * 40 + "true" + ")" * 40])
def test_a_rule_that_cannot_be_compiled_is_never_used_and_says_why(when: str) -> None:
    (rule,) = compiled([Route(when, A)])
    assert rule.flaw.startswith("when: ")
    assert winner((when, A), ("true", B)) == Decision(1)


def test_without_the_expression_language_rules_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "cel" or name.startswith(("cel.", "common.expr"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cel", None)
    (rule,) = compiled([Route("true", A)])
    assert (rule.expression, rule.flaw) == (None, EXTRA)
    assert decide([rule], ASK, lambda _: "") == Decision()
