"""What a starting agent loads before it answers: nothing that only its conversation with the controller needs."""

import asyncio
import contextlib
import gc
import subprocess
import sys

import pytest

from edge_agent.__main__ import _nothing_collected
from edge_agent.fetch import open_session

LATE = {"aiohttp", "opentelemetry.sdk"}


def test_what_only_the_controller_is_asked_with_is_not_loaded_at_the_start() -> None:
    program = f"import sys, edge_agent.__main__, edge_agent.app; print(sorted({LATE} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


async def test_all_requests_share_one_session_also_when_they_begin_together() -> None:
    async with open_session("token") as session:
        first, second = await asyncio.gather(session.client(), session.client())
        assert first is second
        assert first.headers["Authorization"] == "Bearer token"
    assert first.closed


@pytest.mark.parametrize("ends_well", [True, False])
def test_garbage_is_collected_again_once_the_agent_is_loaded(*, ends_well: bool) -> None:
    try:
        with contextlib.suppress(RuntimeError), _nothing_collected():
            assert not gc.isenabled()
            if not ends_well:
                raise RuntimeError
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
