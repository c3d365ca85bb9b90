"""What many tests share: the real models, and a promise that nothing waits for ever."""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is no behaviour: a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Tests keep every machine busy, and an agent would put its updates off for that.
os.environ["FERRY_AGENT_DEFER_S_MAX"] = "0"

# Some machines are told to keep no compiled code. Then each of the hundreds of programs that tests start would compile
# all of ours again: a fifth of what a start costs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for the tests that load onnxruntime themselves, to compare with

MODELS = Path(__file__).parent.parent / ".demo/models"
V32 = MODELS / "magika-0.6.1/magika/models/standard_v3_2/model.onnx"
V33 = MODELS / "magika-0.6.3/magika/models/standard_v3_3/model.onnx"


@pytest.fixture(scope="session")
def real_models() -> tuple[Path, Path]:
    """Two real releases of one model (3.2 MB each): the older and its retrained successor."""
    if not (V32.is_file() and V33.is_file()):
        pytest.skip("the real models are not here: run `make test`, which fetches them")
    return V32, V33


async def eventually(condition: Callable[[], object], what: str, within_s: float = 30.0) -> None:
    """Wait until `condition()` is true; fail, naming `what`, when it does not become so."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen within {within_s} s: {what}")
        await asyncio.sleep(0.02)
