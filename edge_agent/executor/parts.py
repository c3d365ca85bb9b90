"""What the executor works with, and its limits."""

import random
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from common.backoff import Backoff
from common.clock import Clock
from common.ids import ModelName
from common.trust import PublicKey
from edge_agent.executor.pacing import Pacing
from edge_agent.fetch import Fetching
from edge_agent.inference.live import LiveModels
from edge_agent.inference.memory import Memory
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.serving import ModelServer
from edge_agent.journal import Journal
from edge_agent.slots import Slots
from edge_agent.telemetry.usage import Findings


class UpdateLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how long."""

    health_s: float = 0.5
    """How often a candidate in probation is looked at."""
    probe_requests: int = 25
    """Requests of our own to a candidate that got too few others; enough for a verdict."""
    backoff: Backoff = Backoff(base_s=1.0, cap_s=60.0)
    """Between tries of an update that was interrupted."""
    models_max: int = 0
    """Models that are served at one time; 0: as many as memory holds."""
    rest_check_s: float = 5.0
    """How often it is looked at who has had no request for long."""
    scrub_interval_s: float = 86_400.0
    """How often the files in the slots are read again; 0: never."""
    scrub_bytes_per_s: int = 4 * 1024 * 1024
    """How fast, at most."""


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """When a model's session is in memory; see `AgentSettings.cold_start`."""

    mode: Literal["resident", "prewarmed", "lazy"] = "resident"
    idle_s: float = 300.0


def _resident(_: ModelName) -> ColdStart:
    return ColdStart()


class Parts(NamedTuple):
    """The agent's parts that an update needs. `changed` is called after every change that is worth a report; `boot` is
    the machine's run (see `Journal.begin_run`); without `optimised` every load is a plain one, without `memory`
    none is refused. `custom_ops` says whether releases may bring native code. What is found wrong with installed files
    is counted in `findings`.
    """

    journal: Journal
    slots: Slots
    fetcher: Fetching
    server: ModelServer
    clock: Clock
    chance: random.Random
    keys: tuple[PublicKey, ...]
    changed: Callable[[], None]
    findings: Findings
    limits: UpdateLimits = UpdateLimits()
    boot: int = 0
    custom_ops: bool = False
    optimised: OptimisedModels | None = None
    memory: Memory | None = None
    cold: Callable[[ModelName], ColdStart] = _resident
    pacing: Pacing | None = None
    live: LiveModels | None = None
