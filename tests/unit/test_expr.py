"""Selectors: what matches, what does not, and what is refused with the place and the reason."""

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact.manifest import DEFAULT_VARIANT
from common.errors import InvalidInput, TooLarge
from common.expr import EXPRESSION_CHARS_MAX, compile_expression
from common.ids import parse_device_id
from controller.devices import FACT_NAMES, Device, facts

FACTS: dict[str, Any] = {
    "id": "press-7",
    "labels": {"site": "oslo", "line": "b"},
    "presence": "online",
    "running": {"detector": "1.4.0", "content.type": "2"},
    "machine": "x86_64",
    "agent_version": "0.1.0",
    "cpu_count": 4,
    "memory_mb": 2048,
    "disk_free_mb": 900,
}


def matches(text: str) -> bool:
    return compile_expression(text, FACT_NAMES).matches(FACTS)


def refusal(text: str, field: str = "selector") -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        compile_expression(text, FACT_NAMES, field).matches(FACTS)
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        "true",
        'labels.site == "oslo"',
        "labels.site == 'oslo' && cpu_count >= 4",
        'labels["site"] != "bergen"',
        'labels.site in ["oslo", "bergen"]',
        '"site" in labels',
        "has(labels.site) && !has(labels.zone)",
        'id.startsWith("press-") && id.matches("^press-[0-9]+$")',
        'running.detector == "1.4.0"',
        'running["content.type"] == "2"',
        "cpu_count > 3.5",
        "memory_mb / 1024 == 2",
        'int(id.size()) == 7 && string(cpu_count) == "4"',
        'labels.exists(key, labels[key] == "b") && labels.all(key, key != "zone")',
        'presence == "online" ? true : false',
        'labels.zone == "x" || labels.site == "oslo"',
        '// a remark\nlabels.site == "oslo"',
    ],
)
def test_what_is_true_of_a_device_matches(text: str) -> None:
    assert matches(text)


@pytest.mark.parametrize(
    "text", ["false", 'labels.site == "bergen"', "cpu_count > 4", 'running.other == "1"', 'id == "press-8"']
)
def test_what_is_false_of_a_device_does_not_match(text: str) -> None:
    assert not matches(text)


@pytest.mark.parametrize(
    "text", ['labels.zone == "x"', 'labels.zone != "x"', '!(labels.zone == "x")', 'labels["zone"].startsWith("x")']
)
def test_a_label_that_the_device_lacks_does_not_match_whatever_is_asked_of_it(text: str) -> None:
    assert not matches(text)


def test_asking_whether_a_label_is_there_first_makes_its_absence_match() -> None:
    assert matches('!has(labels.zone) || labels.zone != "x"')


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "line 1, column 1", "ends too early"),
        ("cpu_count >", "line 1, column 12", "ends too early"),
        ('labels.site = "oslo"', "line 1, column 13", "'=' is not expected"),
        ('id == "a" and cpu_count > 1', "line 1, column 11", "'and' is not expected"),
        ("true &&\n  cpu_count >< 1", "line 2, column 14", "'<' is not expected"),
        ('id == "open', "line 1, column 7", "is not expected"),
        ("zone == 1", "line 1, column 1", "unknown name 'zone'"),
        ('id == "zone" && \n zone == 1', "line 2, column 2", "unknown name 'zone'"),
        ("labels.x == site", "line 1, column 13", "unknown name 'site'"),
        ("exec(id) == 1", "line 1, column 1", "unknown function 'exec'"),
        ("[1].all(x, [2].all(y, x < y))", "line 1, column 15", "a comprehension inside another"),
    ],
)
def test_errors_say_where_and_why(text: str, where: str, what: str) -> None:
    error = refusal(text)
    assert error.message.startswith(where)
    assert what in error.message
    assert error.field == "selector"
    assert error.fix


def test_words_of_other_languages_get_a_translation() -> None:
    assert refusal("true and true").fix == "CEL writes &&"
    assert refusal("true or true").fix == "CEL writes ||"
    assert refusal('id = "a"').fix == "CEL writes =="


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert all(name in str(refusal("zone == 1").fix) for name in FACT_NAMES)


def test_the_field_that_is_wrong_is_the_callers() -> None:
    assert refusal("zone == 1", "phases[2].selector").field == "phases[2].selector"


@pytest.mark.parametrize("text", ["cpu_count", "labels", 'labels.site + "x"', "null"])
def test_something_other_than_true_or_false_is_refused(text: str) -> None:
    assert "not true or false" in refusal(text).message


@pytest.mark.parametrize(
    "text",
    ['cpu_count > "a"', "int(id) > 1", "cpu_count / 0 == 1", 'id.matches("(")', "id.first == 1", "[1][5] == 1",
     "cpu_count + 9223372036854775807 > 0", "!cpu_count", "Device{id: 1} == 1"],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_the_expressions_fault(text: str) -> None:
    assert refusal(text).field == "selector"


@pytest.mark.parametrize(
    "text",
    [
        " " * EXPRESSION_CHARS_MAX + "true",
        "(" * 33 + "true" + ")" * 33,
        "[" * 33 + "]" * 33 + " == []",
        " && ".join(['labels.all(k, k != "x")'] * 5),
    ],
)
def test_expressions_over_a_limit_are_refused(text: str) -> None:
    with pytest.raises(TooLarge):
        compile_expression(text, FACT_NAMES)


@pytest.mark.parametrize(
    "text",
    ["!" * 1000 + "true", "-" * 1000 + "1 == 1", "||".join(["true"] * 170), "1" + "+1" * 500 + " > 0",
     "true?true:" * 100 + "true", "id" + ".a" * 500, "id" + "[0]" * 300],
)  # fmt: skip
def test_long_chains_end_in_an_answer_or_a_refusal(text: str) -> None:
    try:
        compile_expression(text, FACT_NAMES).matches(FACTS)
    except InvalidInput:
        return


@pytest.mark.parametrize(
    "text",
    [
        '"[1].all(x, [2].all(y, true))" == id',
        "r'\\' == id && 'zone' != id",
        '"""zone " zone""" != id',
        "'\\'(((' == id",
    ],
)
def test_what_stands_in_a_string_is_not_taken_for_grammar(text: str) -> None:
    compile_expression(text, FACT_NAMES).matches(FACTS)


@given(st.text(max_size=60) | st.text("()[]{}!&|=<>.,:?\"'\\ \n/abx019+-%*rb", max_size=60))
def test_any_text_gives_an_expression_or_a_named_refusal(text: str) -> None:
    try:
        compile_expression(text, FACT_NAMES).matches(FACTS)
    except InvalidInput as error:
        assert error.field == "selector"
        assert error.message


def test_one_expression_serves_several_threads() -> None:
    expression = compile_expression('labels.site == "oslo" && cpu_count == 4', FACT_NAMES)
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.extend(expression.matches(FACTS) for _ in range(200))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 800


def test_the_fact_names_are_the_keys_of_the_facts_and_every_fact_can_be_asked() -> None:
    device = Device(id=parse_device_id("press-7"), created_at=0.0)
    known = facts(device, now=1.0)
    assert set(known) == FACT_NAMES == set(FACTS)
    assert compile_expression(f'presence == "never_seen" && id != "{DEFAULT_VARIANT}"', FACT_NAMES).matches(known)
    assert {name: type(value) for name, value in known.items()} == {name: type(value) for name, value in FACTS.items()}
