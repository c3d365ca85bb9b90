"""Which build of a release a device gets whose owner leaves that to measurement (`variants = ["auto"]`). Pure.

Devices say how long a run of a variant takes them (`Finding`), and those that are built alike say it for each other:
they are of one class (`Capabilities.device_class`). What other classes found says nothing here. For one device:

1. A variant that fewer than `EXPLORERS` devices of the class have tried or are trying, and that no device of the class
   has failed on, is given to it: the one with the fewest tries. A device tries no variant twice.
2. While others of the class are still trying, it waits for what they find.
3. Then it gets the variant with the smallest median, if that saves `GAIN_MIN` of what it would get otherwise: the
   variant of this release that it was given before, or else `default`.

A failure counts as an endless run in the release in which it happened, so one failure ends the trying, and a variant on
which half of the class failed is never the fastest. A device does not get a variant that it has failed on itself, as
long as there is another.

    >>> found = {"default": [Finding(DeviceId("a"), 0.010)], "int8": [Finding(DeviceId("b"), 0.004)]}
    >>> settle(found, ["default", "int8"], DeviceId("c")).because
    'fastest of 2 on this class: int8 4 ms (1 device), default 10 ms (1 device)'
"""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Final, NamedTuple

import msgspec

from common.artifact.manifest import DEFAULT_VARIANT
from common.ids import DeviceId, Version

EXPLORERS: Final = 2
"""Devices of a class that try a variant: one alone may have had a bad moment."""
GAIN_MIN: Final = 0.1
"""Share of the time that another variant must save: less is noise, and it is another download."""
LISTED_MAX: Final = 5
"""Variants that a reason names."""


class Finding(NamedTuple):
    """What a device found of a variant: the median seconds of a run. None: it takes it, and was not measured."""

    device: DeviceId
    run_s: float | None = None
    failed: bool = False


Findings = Mapping[str, Sequence[Finding]]
"""By variant, the findings of the devices of one class, one each."""


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """The variant that was chosen for a device of `device_class`, to try it (`exploring`) or for good, and why."""

    version: Version
    variant: str
    device_class: str
    exploring: bool = False
    because: str = ""


class Decision(NamedTuple):
    """A variant, whether it is given to be measured, and why, as a sentence."""

    variant: str
    exploring: bool
    because: str


def decide(
    found: Findings,
    variants: Collection[str],
    device: DeviceId,
    *,
    trying: Mapping[str, Collection[DeviceId]],
    awaited: bool,
    before: str | None = None,
) -> Decision | None:
    """The variant for `device`, of those that the release has; None: it waits for what others find.

    `trying` are the devices of its class that were given a variant to try and have not said how it went, `awaited`
    whether some of them are expected to; `before` is the variant of this release that the device was given last.
    """
    if (variant := _to_try(found, variants, device, trying)) is not None:
        tries = len(_tried_by(found.get(variant, ()), trying.get(variant, ())))
        because = f"to be measured: {tries} of {EXPLORERS} devices of this class have tried {variant}"
        return Decision(variant, True, because)
    return None if awaited else settle(found, variants, device, before)


def settle(found: Findings, variants: Collection[str], device: DeviceId, before: str | None = None) -> Decision:
    """The variant for `device` by what has been found, whatever is still to be tried."""
    medians = {name: run_s for name in variants if (run_s := median_run_s(found.get(name, ()))) is not None}
    possible = [name for name in _ordered(variants) if not _failed_on(found, name, device)] or _ordered(variants)
    base = _base(possible, medians, before)
    fastest = min(possible, key=lambda name: (medians.get(name, math.inf), name != base))
    saves = base in medians and medians[fastest] <= (1 - GAIN_MIN) * medians[base]
    if saves or (fastest == base and base in medians):
        return Decision(fastest, False, f"fastest of {len(medians)} on this class: {_listed(found, medians)}")
    if base in medians:
        nothing = f"nothing saves {GAIN_MIN:.0%} of what {base} takes on this class"
        return Decision(base, False, f"{nothing}: {_listed(found, medians)}")
    return Decision(base, False, f"no device of this class has measured {base}")


def _to_try(
    found: Findings, variants: Collection[str], device: DeviceId, trying: Mapping[str, Collection[DeviceId]]
) -> str | None:
    open_to = [
        name
        for name in _ordered(variants)
        if not any(one.failed or one.device == device for one in found.get(name, ()))
        and len(_tried_by(found.get(name, ()), trying.get(name, ()))) < EXPLORERS
    ]
    return min(open_to, key=lambda name: len(_tried_by(found.get(name, ()), trying.get(name, ()))), default=None)


def _tried_by(findings: Sequence[Finding], trying: Collection[DeviceId]) -> set[DeviceId]:
    return {one.device for one in findings} | set(trying)


def _ordered(variants: Collection[str]) -> list[str]:
    """`default` first, the others by name."""
    return sorted(variants, key=lambda name: (name != DEFAULT_VARIANT, name))


def median_run_s(findings: Sequence[Finding]) -> float | None:
    """None when nobody has measured; infinite when half of the devices or more failed."""
    seconds = _seconds(findings)
    return median(seconds) if seconds else None


def _seconds(findings: Sequence[Finding]) -> list[float]:
    return [run_s for one in findings if (run_s := math.inf if one.failed else one.run_s) is not None]


def _failed_on(found: Findings, variant: str, device: DeviceId) -> bool:
    return any(one.failed and one.device == device for one in found.get(variant, ()))


def _base(possible: Sequence[str], medians: Mapping[str, float], before: str | None) -> str:
    """What the device gets unless another is clearly faster."""
    if before is not None and before in possible and (not medians or math.isfinite(medians.get(before, math.inf))):
        return before
    if DEFAULT_VARIANT in possible:
        return DEFAULT_VARIANT
    return min(possible, key=lambda name: medians.get(name, math.inf))


def _listed(found: Findings, medians: Mapping[str, float]) -> str:
    fastest = sorted(medians, key=lambda name: (medians[name], name))
    words = [f"{name} {_in_words(_seconds(found[name]))}" for name in fastest[:LISTED_MAX]]
    return ", ".join(words) + (", ..." if len(fastest) > LISTED_MAX else "")


def _in_words(seconds: Sequence[float]) -> str:
    devices = "1 device" if len(seconds) == 1 else f"{len(seconds)} devices"
    if math.isfinite(median(seconds)):
        return f"{median(seconds) * 1000:.3g} ms ({devices})"
    return f"failed on {sum(map(math.isinf, seconds))} of {devices}"
