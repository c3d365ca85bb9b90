"""Whether answers are what a self-test expects, and in what they differ if they are not.

    >>> differs(Close(rtol=0.0, atol=0.1), np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    '1 of 2 values differ, most at [1]: 2.5 instead of 2.0, off by 0.5, allowed is 0.1 + 0 * |expected|'

Expected values are finite, for a device takes any other answer for a failure; so a NaN or an infinity is never close
to anything and never a largest element.
"""

from collections.abc import Mapping

import numpy as np

from common.artifact.samples import Sample
from common.artifact.selftest import Close, Exact, Rule, SelfTest, Top1
from common.artifact.tensor_spec import TensorSpec
from common.artifact.tensors import Array, accepts, check_feeds, datatype_of, describe, in_words
from common.errors import InvalidInput

TEXT_CHARS_MAX = 40
"""Of a string that is quoted in a difference."""


def differs(rule: Rule, expected: Array, found: Array) -> str | None:
    """In words how `found` breaks the rule; None when it keeps it."""
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        got, wanted = (f"{datatype_of(array)} {list(array.shape)}" for array in (found, expected))
        return f"{got} instead of {wanted}"
    match rule:
        case Exact():
            return _first(found != expected, expected, found)
        case Close():
            return _farthest(rule, expected, found)
        case Top1():
            return _other_top(expected, found)


def first_difference(rules: Mapping[str, Rule], sample: Sample, found: Mapping[str, Array]) -> str | None:
    """How the answers `found` to a sample break the rules, naming sample and output; None when they keep them."""
    for output, rule in rules.items():
        if output not in found:
            return f"sample {sample.name!r}: there is no output {output!r}"
        if difference := differs(rule, sample.outputs[output], found[output]):
            return f"sample {sample.name!r}: output {output!r}: {difference}"
    return None


def check_samples(
    samples: tuple[Sample, ...], test: SelfTest, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    """Raise `InvalidInput` unless the samples are as many as `test` says, fit the model's tensors and its rules."""
    if not samples:
        raise InvalidInput("there are none", field="samples", fix="give at least one")
    if len(samples) != test.count:
        raise InvalidInput(f"{len(samples)} samples, {test.count} were announced", field="samples")
    specs = {spec.name: spec for spec in outputs}
    for output, rule in test.rules.items():
        if output not in specs:
            fix = f"it has {in_words(specs)}"
            raise InvalidInput("the model has no such output", field=f"rules.{output}", fix=fix)
        _check_rule(rule, specs[output])
    for sample in samples:
        try:
            check_feeds(inputs, sample.inputs)
            _check_expected(sample, test, specs)
        except InvalidInput as error:
            raise InvalidInput(error.message, field=f"samples.{sample.name}.{error.field}", fix=error.fix) from error


def _check_rule(rule: Rule, spec: TensorSpec) -> None:
    if isinstance(rule, Exact) or spec.datatype not in {"BOOL", "BYTES"}:
        return
    raise InvalidInput(f"{spec.datatype} values are equal or not", field=f"rules.{spec.name}", fix="make it exact")


def _check_expected(sample: Sample, test: SelfTest, specs: Mapping[str, TensorSpec]) -> None:
    if sample.outputs.keys() != test.rules.keys():
        fix = f"give those that have a rule: {in_words(test.rules)}"
        raise InvalidInput(f"has {in_words(sample.outputs) or 'none'}", field="outputs", fix=fix)
    for output, array in sample.outputs.items():
        field, spec = f"outputs.{output}", specs[output]
        if not accepts(spec, array):
            got = f"{datatype_of(array)} {list(array.shape)}"
            raise InvalidInput(got, field=field, fix=f"the model answers {describe(spec)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            fix = "devices take a NaN or an infinity for a failure: leave the sample out"
            raise InvalidInput("a value is not finite", field=field, fix=fix)
        if isinstance(test.rules[output], Top1) and (not array.shape or not array.size):
            raise InvalidInput("has no largest element along a last axis", field=field, fix="use another rule")


def _first(wrong: Array, expected: Array, found: Array) -> str | None:
    if not wrong.any():
        return None
    place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return f"{_share(wrong)}, first at {_place(place)}: {_quoted(found[place])} instead of {_quoted(expected[place])}"


def _farthest(rule: Close, expected: Array, found: Array) -> str | None:
    wanted, got = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        off, allowed = np.abs(got - wanted), rule.atol + rule.rtol * np.abs(wanted)
        wrong = ~(off <= allowed) | ~np.isfinite(got)
        if not wrong.any():
            return None
        excess = np.where(np.isnan(off), np.inf, off - allowed)
    place = np.unravel_index(int(np.argmax(np.where(wrong, excess, -np.inf))), wrong.shape)
    return (
        f"{_share(wrong)}, most at {_place(place)}: {found[place]!s} instead of {expected[place]!s}, "
        f"off by {off[place]:g}, allowed is {rule.atol:g} + {rule.rtol:g} * |expected|"
    )


def _other_top(expected: Array, found: Array) -> str | None:
    wanted, got = (array == array.max(-1, keepdims=True) for array in (expected, found))
    wrong = ~(wanted & got & np.isfinite(found.astype(np.float64)).all(-1, keepdims=True)).any(-1)
    if not wrong.any():
        return None
    place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    tops = [int(np.argmax(array[place])) for array in (found, expected)]
    rows = f"{int(wrong.sum())} of {wrong.size} rows have another largest element"
    return f"{rows}, first at {_place(place)}: {tops[0]} instead of {tops[1]}"


def _share(wrong: Array) -> str:
    return f"{int(wrong.sum())} of {wrong.size} values differ"


def _place(place: tuple[np.intp, ...]) -> str:
    return str([int(axis) for axis in place])


def _quoted(value: object) -> str:
    return repr(value[:TEXT_CHARS_MAX]) if isinstance(value, str) else str(value)
