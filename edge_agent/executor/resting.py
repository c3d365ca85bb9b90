"""Models that nobody asks leave the memory, where the owner of the device wants that; the next request loads them.

Never while a release is being tried: a candidate is proven by being loaded, and its fallback stands by in memory.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from edge_agent.executor.lane import Lane
from edge_agent.executor.parts import Parts
from edge_agent.update import Stage

logger = logging.getLogger(__name__)

AWAKE: Final = frozenset({Stage.WARMING, Stage.SHADOWING, Stage.REPLACING, Stage.SWITCHING, Stage.PROBATION})
"""Stages in which nothing is put to sleep."""


async def rest_idle(parts: Parts, lanes: Callable[[], Sequence[Lane]]) -> None:
    """For ever: look now and again at who has had no request for long enough."""
    while True:
        await asyncio.sleep(parts.limits.rest_check_s)
        for lane in lanes():
            model, cold = lane.state.model, parts.cold(lane.state.model)
            idle = cold.mode != "resident" and parts.server.is_idle(model, cold.idle_s)
            if idle and lane.state.stage not in AWAKE:
                logger.info("nobody asks for it: out of memory until somebody does", extra={"model": model})
                await parts.server.rest(model)
