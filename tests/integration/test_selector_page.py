"""The reference page of selectors lists what the code knows: facts, functions, limits, and examples that compile."""

import re
from pathlib import Path

from common.expr import EXPRESSION_CHARS_MAX, FUNCTIONS, compile_expression
from common.expr.expression import COMPREHENSIONS_MAX, NESTING_MAX
from controller.devices import FACT_NAMES

PAGE = (Path(__file__).parent.parent.parent / "docs/reference/selectors.md").read_text()


def section(heading: str) -> str:
    return PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


def first_column(text: str) -> list[str]:
    return [cell.replace("\\|", "|") for cell in re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)]


def test_the_facts_are_the_ones_a_selector_may_speak_of() -> None:
    assert set(first_column(section("Facts"))) == FACT_NAMES


def test_the_examples_compile() -> None:
    examples = first_column(section("Examples"))
    assert len(examples) > 5
    for example in examples:
        compile_expression(example, FACT_NAMES)


def test_the_functions_are_listed() -> None:
    functions = section("What is in the language").split("- Functions:")[1].split("- Macros:")[0]
    assert set(re.findall(r"`(\w+)`", functions)) == FUNCTIONS


def test_the_limits_are_the_codes() -> None:
    figures = [int(number) for number in re.findall(r"\| (\d+)", section("Limits"))]
    assert figures == [EXPRESSION_CHARS_MAX, NESTING_MAX, COMPREHENSIONS_MAX]
