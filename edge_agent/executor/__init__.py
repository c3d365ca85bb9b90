"""Carries out what the update machine decides: the shell between `edge_agent.update` and the real world.

`Executor` accepts orders and keeps one `Lane` per model. A lane takes events one at a time: decide, save, act. Long
work (`acquire`: get and build; `trial`: load, watch, probe) runs beside it as a task that ends in one event; when the
machine says `Cancel`, the task's end is awaited and its event dropped, so a late result is never taken for a new one.
"""

from edge_agent.executor.executor import Executor, Standing
from edge_agent.executor.lane import Lane
from edge_agent.executor.pacing import Pacing
from edge_agent.executor.parts import ColdStart, Parts, UpdateLimits

__all__ = ["ColdStart", "Executor", "Lane", "Pacing", "Parts", "Standing", "UpdateLimits"]
