"""CEL through the `common-expression-language` package: bounded, and its errors put into our words."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from common.errors import InvalidInput, TooLarge
from common.expr.engine import cel
from common.expr.outline import Outline

EXPRESSION_CHARS_MAX = 1024
NESTING_MAX = 32
"""Brackets inside brackets; the parser recurses."""
COMPREHENSIONS_MAX = 4

FUNCTIONS = frozenset({"size", "contains", "startsWith", "endsWith", "matches", "int", "double", "string"})
"""What may be called, beside operators and the macros `has`, `all`, `exists`, `exists_one`, `map` and `filter`."""

FIX_READ_DOCS = "see docs/reference/selectors.md"

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_PARSE_ERROR = re.compile(r"<input>:(\d+):(\d+): (.*)")
_UNEXPECTED = re.compile(
    r"(?:mismatched input|extraneous input|token recognition error at:|no viable .* input) '(.*?)'"
)
_END_OF_TEXT = "<EOF>"
_SPELLINGS = {"and": "&&", "or": "||", "not": "!", "=": "==", "&": "&&", "|": "||"}


class Expression:
    """A compiled expression; make it with `compile_expression`. It has no state and can be shared between threads.

    `names` are those of the facts that it speaks of: `matches` needs no others.
    """

    def __init__(self, text: str, program: cel.Program, field: str, names: frozenset[str]) -> None:
        self.text = text
        self.names = names
        self._program = program
        self._field = field

    def matches(self, facts: Mapping[str, Any]) -> bool:
        """Whether the expression is true of `facts` (plain values: bool, int, float, str, list, dict with str keys).

        A key that a map in `facts` lacks means False. `InvalidInput` when the expression cannot be evaluated on such
        facts at all (a text compared with a number) or gives something other than true or false.
        """
        try:
            result = self._program.execute(dict(facts))
        except KeyError:
            return False
        except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
            fix = "compare text with text and numbers with numbers" if isinstance(error, TypeError) else FIX_READ_DOCS
            raise InvalidInput(_sentence(error), field=self._field, fix=fix) from error
        if not isinstance(result, bool):
            fix = "compare it with something, e.g. cpu_count >= 4"
            raise InvalidInput(f"gives {type(result).__name__}, not true or false", field=self._field, fix=fix)
        return result

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


def compile_expression(text: str, names: frozenset[str], field: str = "selector") -> Expression:
    """The expression in `text`, which may speak of `names`.

    `InvalidInput` with the reason, and where in `text`; `TooLarge` when it exceeds a limit of this module. `field` is
    what the errors say is wrong.
    """
    if len(text) > EXPRESSION_CHARS_MAX:
        raise TooLarge(f"{len(text)} characters", field=field, fix=f"at most {EXPRESSION_CHARS_MAX}")
    outline = Outline(text)
    _check_cost(outline, field)
    try:
        program = cel.compile(text)
    except (ValueError, RuntimeError) as error:
        _refuse_syntax(error, field)
    references = program.references()
    _check_names(outline, references["variables"], names, field)
    _check_functions(outline, references["functions"], field)
    return Expression(text, program, field, names.intersection(references["variables"]))


def _check_cost(outline: Outline, field: str) -> None:
    if outline.nesting > NESTING_MAX:
        raise TooLarge(f"brackets {outline.nesting} deep", field=field, fix=f"at most {NESTING_MAX}")
    if outline.comprehensions > COMPREHENSIONS_MAX:
        raise TooLarge(f"{outline.comprehensions} comprehensions", field=field, fix=f"at most {COMPREHENSIONS_MAX}")
    if outline.nested_comprehension is not None:
        where = outline.position(outline.nested_comprehension)
        raise InvalidInput(f"{where}: a comprehension inside another", field=field, fix="write them side by side")


def _check_names(outline: Outline, used: list[str], names: frozenset[str], field: str) -> None:
    for name in used:
        if name not in names and name not in outline.bound_names:
            where = outline.position_of(name)
            known = ", ".join(sorted(names))
            raise InvalidInput(f"{where}: unknown name {name!r}", field=field, fix=f"known names: {known}")


def _check_functions(outline: Outline, used: list[str], field: str) -> None:
    for name in used:
        if _IDENTIFIER.fullmatch(name) and name not in FUNCTIONS:
            where = outline.position_of(name)
            fix = f"known functions: {', '.join(sorted(FUNCTIONS))}"
            raise InvalidInput(f"{where}: unknown function {name!r}", field=field, fix=fix)


def _refuse_syntax(error: Exception, field: str) -> NoReturn:
    found = _PARSE_ERROR.search(str(error))
    if found is None:
        raise InvalidInput(_sentence(error), field=field, fix=FIX_READ_DOCS) from error
    line, column, reason = found.groups()
    unexpected = _UNEXPECTED.search(reason)
    found_there = unexpected[1].strip() if unexpected else ""
    if found_there:
        reason = "it ends too early" if found_there == _END_OF_TEXT else f"{found_there!r} is not expected here"
    fix = f"CEL writes {_SPELLINGS[found_there]}" if found_there in _SPELLINGS else FIX_READ_DOCS
    raise InvalidInput(f"line {line}, column {column}: {reason}", field=field, fix=fix) from error


def _sentence(error: Exception) -> str:
    """The first sentence of what the CEL package says; the rest is advice for its own users."""
    return str(error).splitlines()[0].split(". ")[0][:200] if str(error) else type(error).__name__
