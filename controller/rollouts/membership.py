"""Who belongs to which phase of a rollout.

The matched devices are put in an order that depends only on the rollout's salt and their ids: `position` maps each to
a point of [0, 1) by SHA-256. A phase by percent or count takes the front of that order, a phase by selector adds those
that match. Phases are cumulative, so widening keeps everybody who was in. A percentage rounds up: a phase of 1 % of
ten devices has one device.

Knows nothing of states, time or orders.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence, Set

from common.errors import InvalidInput
from common.expr import compile_expression
from common.ids import DeviceId
from controller.devices import FACT_NAMES, Device, facts
from controller.rollouts.model import PhaseSpec

_POSITION_BITS = 53  # what a float holds exactly


def position(salt: str, device: DeviceId) -> float:
    """Where a device stands in [0, 1): the first 53 bits of SHA-256 over `salt`, a zero byte and the id."""
    digest = hashlib.sha256(f"{salt}\0{device}".encode()).digest()
    return float((int.from_bytes(digest[:8]) >> (64 - _POSITION_BITS)) / (1 << _POSITION_BITS))


def select(selector: str, devices: Iterable[Device], now: float, field: str = "selector") -> list[Device]:
    """The devices that `selector` matches; `InvalidInput` with position and reason when it does not compile."""
    expression = compile_expression(selector, FACT_NAMES, field)
    return [device for device in devices if expression.matches(facts(device, now))]


def select_some(selector: str, devices: Iterable[Device], now: float) -> list[Device]:
    """As `select`, but `InvalidInput` when there is none: a rollout over nobody is a mistake."""
    fleet = list(devices)
    if not fleet:
        raise InvalidInput("the fleet has no devices", field="selector", fix="let one join: ferry device token create")
    matched = select(selector, fleet, now)
    if not matched:
        raise InvalidInput("matches no device", field="selector", fix="try it with: ferry device list --selector")
    return matched


def reach(phase: PhaseSpec, total: int) -> int | None:
    """How many of `total` devices a phase by percent or count reaches, earlier phases included; None by selector."""
    if phase.count is not None:
        return min(phase.count, total)
    if phase.percent is not None:
        # 7 % of 100 is 7.000000000000001 in floats, and that is not eight devices.
        return min(total, math.ceil(round(phase.percent * total / 100, 9)))
    return None


def phase_of_each(
    salt: str, devices: Sequence[DeviceId], phases: Sequence[PhaseSpec], chosen: Mapping[int, Set[DeviceId]]
) -> dict[DeviceId, int]:
    """The index of the first phase of each device that some phase reaches.

    `chosen` holds, for every phase by selector, the devices that its selector matches.
    """
    ranked = sorted(devices, key=lambda device: (position(salt, device), device))
    placed: dict[DeviceId, int] = {}
    for index, phase in enumerate(phases):
        waiting = [device for device in ranked if device not in placed]
        size = reach(phase, len(ranked))
        if size is None:
            joining = [device for device in waiting if device in chosen[index]]
        else:
            joining = waiting[: max(0, size - len(placed))]
        placed.update(dict.fromkeys(joining, index))
    return placed


def draw(salt: str, devices: Sequence[Device], phases: Sequence[PhaseSpec], now: float) -> dict[DeviceId, int]:
    """The phase of each of `devices`, checked: `InvalidInput` unless the phases widen and the last reaches everyone."""
    check_widening(phases, len(devices))
    chosen = {
        index: {device.id for device in select(phase.selector, devices, now, f"phases[{index}].selector")}
        for index, phase in enumerate(phases)
        if phase.selector is not None
    }
    placed = phase_of_each(salt, [device.id for device in devices], phases, chosen)
    last = len(phases) - 1
    if len(placed) < len(devices):
        message = f"the last phase reaches {len(placed)} of {len(devices)} matched devices"
        raise InvalidInput(message, field=f"phases[{last}]", fix="end with a phase of percent 100")
    if 0 not in placed.values():
        fix = "begin with a phase that matches a device: nothing can be learnt from an empty one"
        raise InvalidInput("matches no device of this rollout", field="phases[0].selector", fix=fix)
    return placed


def check_widening(phases: Sequence[PhaseSpec], total: int) -> None:
    """`InvalidInput` unless each phase says how far it reaches in one way, and further than the one before."""
    if not phases:
        raise InvalidInput("there are none", field="phases", fix="name at least one phase, for example percent 100")
    before: PhaseSpec | None = None
    for index, phase in enumerate(phases):
        ways = [name for name in ("percent", "count", "selector") if getattr(phase, name) is not None]
        if len(ways) != 1:
            fix = "give exactly one of percent, count and selector"
            raise InvalidInput(f"says {' and '.join(ways) or 'nothing'}", field=f"phases[{index}]", fix=fix)
        if phase.selector is not None:
            continue
        if before is not None and not _wider(before, phase, total):
            fix = "phases are cumulative: each must reach further than the one before, for example 1, 10, 50, 100"
            value = f"{getattr(phase, ways[0]):g} does not reach further than the phase before"
            raise InvalidInput(value, field=f"phases[{index}].{ways[0]}", fix=fix)
        before = phase


def _wider(before: PhaseSpec, phase: PhaseSpec, total: int) -> bool:
    if before.percent is not None and phase.percent is not None:
        return phase.percent > before.percent
    if before.count is not None and phase.count is not None:
        return phase.count > before.count
    # Percent against count can only be compared in devices, and small fleets round to the same number.
    return (reach(phase, total) or 0) >= (reach(before, total) or 0)
