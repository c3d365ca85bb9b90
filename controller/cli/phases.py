"""Phases as people read them: how far each reaches, and how its devices are doing."""

from controller.resources import RolloutView
from controller.rollouts.model import PhaseSpec


def phase_rows(view: RolloutView) -> list[list[str]]:
    """A table of phases."""
    rows = [["PHASE", "REACH", "STATE", "DEVICES", "SUCCEEDED", "FAILED", "UNDER WAY", "REASON"]]
    for phase in view.phases:
        counts = {state.value: number for state, number in phase.counts.items()}
        under_way = sum(counts.get(state, 0) for state in ("notified", "in_progress", "probation"))
        rows.append(
            [
                str(phase.index + 1),
                reach_of(phase.spec),
                phase.state.value,
                str(phase.devices),
                str(counts.get("succeeded", 0)),
                str(counts.get("failed", 0)),
                str(under_way),
                phase.reason or "-",
            ]
        )
    return rows


def reach_of(phase: PhaseSpec) -> str:
    """How far a phase reaches, as people write it."""
    if phase.percent is not None:
        return f"{phase.percent:g} %"
    return str(phase.count) if phase.count is not None else str(phase.selector)
