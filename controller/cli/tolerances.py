"""How near is near enough, from the command line: `--tolerance` and `--latency-max` as values.

An option is a list of parts with commas between them: `rtol=1e-3`, `atol=1e-4`, `exact` or `top1` says the rule, and
`output=NAME` and `variant=NAME` say where it holds. Without an output it is for all outputs that are floats, because
what the others answer is exact unless somebody says so by name. Where several options hold, the one that names more
wins, then the later one.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec

from common.artifact import TensorSpec
from common.artifact.selftest import LATENCY_S_MAX, Close, Exact, Rule, Top1
from common.errors import InvalidInput

FIX = "write for example rtol=1e-3,atol=1e-4 or output=scores,top1 or variant=int8,atol=0.05"
RTOL, ATOL_OF_LARGEST = 1e-3, 1e-4
HALF_RTOL, HALF_ATOL_OF_LARGEST = 1e-2, 1e-2
"""For outputs of 16 bits, which have 11 bits of precision."""
FLOATS = frozenset({"FP16", "FP32", "FP64"})


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """One option. `word` is `exact` or `top1`; without it the bounds count, and None is what is usual."""

    variant: str | None = None
    output: str | None = None
    word: str = ""
    rtol: float | None = None
    atol: float | None = None


def parse_tolerance(text: str) -> Tolerance:
    """One `--tolerance`."""
    found: dict[str, str | float] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals and key in {"exact", "top1"}:
            key, value = "word", key
        elif not equals or key not in {"rtol", "atol", "output", "variant"} or not value:
            raise InvalidInput(f"{part!r} is not part of a tolerance", field="tolerance", fix=FIX)
        if key in found:
            raise InvalidInput(f"{text!r} says {key} twice", field="tolerance", fix=FIX)
        found[key] = _bound(value) if key in {"rtol", "atol"} else value
    if ("word" in found) == bool(found.keys() & {"rtol", "atol"}):
        raise InvalidInput(f"{text!r} needs bounds, or exact, or top1", field="tolerance", fix=FIX)
    return msgspec.convert(found, Tolerance)


def parse_latencies(texts: Iterable[str], variants: Iterable[str]) -> dict[str, float]:
    """Each `--latency-max`, which is `SECONDS` or `VARIANT=SECONDS`, by variant."""
    known = list(variants)
    general: dict[str, float] = {}
    named: dict[str, float] = {}
    for text in texts:
        variant, equals, seconds = text.rpartition("=")
        if equals and variant not in known:
            raise InvalidInput(f"there is no variant {variant!r}", field="latency-max", fix=f"name one of {known}")
        if equals:
            named[variant] = _seconds(seconds)
        else:
            general = dict.fromkeys(known, _seconds(seconds))
    return general | named


def rule_for(tolerances: Sequence[Tolerance], variant: str, spec: TensorSpec, largest: float) -> Rule:
    """The rule for an output of a variant; `largest` is the largest magnitude that is expected of it."""
    is_float = spec.datatype in FLOATS
    usual = _usual(spec.datatype, largest)
    chosen, rank = None, (-1, -1)
    for tolerance in tolerances:
        fits = tolerance.variant in {None, variant} and tolerance.output in {None, spec.name}
        names_more = (tolerance.output is not None, tolerance.variant is not None)
        if fits and (is_float or tolerance.output is not None) and names_more >= rank:
            chosen, rank = tolerance, names_more
    if chosen is None:
        return usual if is_float else Exact()
    if chosen.word:
        return Exact() if chosen.word == "exact" else Top1()
    return Close(
        rtol=usual.rtol if chosen.rtol is None else chosen.rtol, atol=usual.atol if chosen.atol is None else chosen.atol
    )


def check_names(tolerances: Iterable[Tolerance], outputs: dict[str, tuple[str, ...]]) -> None:
    """`InvalidInput` for a tolerance of something that is not compared; `outputs` are by variant."""
    for tolerance in tolerances:
        if tolerance.variant is not None and tolerance.variant not in outputs:
            fix = f"the variants are {', '.join(outputs)}"
            raise InvalidInput(f"there is no variant {tolerance.variant!r}", field="tolerance", fix=fix)
        names = (
            outputs[tolerance.variant] if tolerance.variant else tuple({n for some in outputs.values() for n in some})
        )
        if tolerance.output is not None and tolerance.output not in names:
            fix = f"the outputs are {', '.join(sorted(names))}"
            raise InvalidInput(f"there is no output {tolerance.output!r}", field="tolerance", fix=fix)


def _usual(datatype: str, largest: float) -> Close:
    """Rounding errors of an element are as large as the elements that it was summed up from, not as itself."""
    rtol, share = (HALF_RTOL, HALF_ATOL_OF_LARGEST) if datatype == "FP16" else (RTOL, ATOL_OF_LARGEST)
    return Close(rtol=rtol, atol=float(f"{share * (largest or 1.0):.3g}"))


def _bound(text: str) -> float:
    value = _number(text, "tolerance")
    if value < 0:
        raise InvalidInput(f"{text!r} is below zero", field="tolerance", fix=FIX)
    return value


def _seconds(text: str) -> float:
    value = _number(text, "latency-max")
    if not 0 < value <= LATENCY_S_MAX:
        fix = f"write seconds above 0 and up to {LATENCY_S_MAX:g}, for example 0.2"
        raise InvalidInput(f"{text!r} is no latency", field="latency-max", fix=fix)
    return value


def _number(text: str, field: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise InvalidInput(f"{text!r} is not a number", field=field, fix="write for example 0.001 or 1e-3") from error
    if not math.isfinite(value):
        raise InvalidInput(f"{text!r} is not finite", field=field, fix="write for example 0.001 or 1e-3")
    return value
