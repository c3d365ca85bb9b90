"""The one expression language: CEL (https://github.com/google/cel-spec), compiled once, evaluated on many facts.

Selectors, gates and skip rules are all expressions over named facts, for example over a device:

    >>> online = compile_expression('labels.site == "oslo" && cpu_count >= 4', frozenset({"labels", "cpu_count"}))
    >>> online.matches({"labels": {"site": "oslo"}, "cpu_count": 8})
    True
    >>> online.matches({"labels": {}, "cpu_count": 8})
    False

What can be known to be wrong without facts is refused when compiling: bad grammar (with its position), unknown names
and functions, comprehensions inside comprehensions (their cost multiplies). A key that a map does not have (a label the
device was not given) makes the expression not match. Everything else that goes wrong on facts, such as comparing a
text with a number, is the expression's fault and is `InvalidInput` too.
"""

from common.expr.expression import EXPRESSION_CHARS_MAX, FUNCTIONS, Expression, compile_expression

__all__ = ["EXPRESSION_CHARS_MAX", "FUNCTIONS", "Expression", "compile_expression"]
