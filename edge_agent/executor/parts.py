"""What the executor works with, and its limits."""

import random
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from common.backoff import Backoff
from common.clock import Clock
from common.trust import PublicKey
from edge_agent.fetch import Fetching
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
    scrub_interval_s: float = 86_400.0
    """How often the files in the slots are read again; 0: never."""
    scrub_bytes_per_s: int = 4 * 1024 * 1024
    """How fast, at most."""


class Parts(NamedTuple):
    """The agent's parts that an update needs. `changed` is called after every change that is worth a report; `boot` is
    the machine's run (see `Journal.begin_run`), `custom_ops` whether releases may bring native code. What is found
    wrong with installed files is counted in `findings`.
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
