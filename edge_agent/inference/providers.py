"""On which execution provider a release runs: the decision, from what a probe has measured. Pure.

ONNX Runtime can hand parts of a graph to a provider (OpenVINO, XNNPACK, CUDA...), which may be faster than its own
kernels, slower, or wrong; which, depends on the model and the machine. So each allowed provider is tried. The CPU is
always among them: its answers are what others are held against, and it is kept unless another is clearly faster.

    >>> choose([Rating(CPU, (0.010, 0.011, 0.010)), Rating("FastExecutionProvider", (0.004, 0.005, 0.004))]).provider
    'FastExecutionProvider'
"""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final, NamedTuple

import msgspec

CPU: Final = "CPUExecutionProvider"
REMOTE: Final = frozenset({"AzureExecutionProvider"})
"""Providers that send inputs to somebody else: they are used by no device."""
ROUNDS: Final = 7
"""Runs of each provider that are timed, one after another in turn, so that other load meets all of them."""
WARM_UP_RUNS: Final = 2
GAIN_MIN: Final = 0.1
"""Share of the CPU's time that another provider must save: less is noise, and it needs more memory."""


class Rating(NamedTuple):
    """What a probe saw of a provider: seconds for each timed run, or what is the trouble with it."""

    provider: str
    seconds: tuple[float, ...] = ()
    trouble: str = ""


class Choice(msgspec.Struct, frozen=True):
    """The provider to use, and for each that was tried the median of its seconds, or why it is out."""

    provider: str
    seen: dict[str, str] = {}


def candidates(allowed: Sequence[str], available: Iterable[str]) -> tuple[str, ...]:
    """The providers to try, the CPU first: those that the owner allows and this runtime has."""
    here = set(available) - REMOTE
    return (CPU, *(one for one in dict.fromkeys(allowed) if one in here and one != CPU))


def turns(providers: Sequence[str], number: int) -> tuple[str, ...]:
    """The order of the providers in round `number`: everybody is first now and then."""
    first = number % len(providers)
    return (*providers[first:], *providers[:first])


def choose(ratings: Sequence[Rating]) -> Choice:
    """The fastest sound provider. `ratings` has the CPU, with its seconds."""
    seen = {one.provider: one.trouble or f"{median(one.seconds):.3g} s" for one in ratings}
    medians = {one.provider: median(one.seconds) for one in ratings if one.seconds and not one.trouble}
    fastest = min(medians, key=medians.__getitem__)
    clearly = medians[fastest] <= (1 - GAIN_MIN) * medians[CPU]
    return Choice(fastest if clearly else CPU, seen)
