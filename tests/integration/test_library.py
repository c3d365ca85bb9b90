"""`from edge_agent import Device`: the whole agent inside an application, called from threads and from coroutines."""

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from common.errors import Conflict, InvalidInput, NotFound
from common.wire import Split
from edge_agent import Device
from edge_agent.identity import save_identity
from tests.conftest import eventually
from tests.integration.release_desk import DEVICE, MODEL, ReleaseDesk
from tests.integration.small_agent import identity_at

ROWS = np.zeros((2, 2048), np.int32)


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


@pytest.fixture
async def device(tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]) -> AsyncIterator[Device]:
    desk.order(desk.release("1.0.0", real_models[0].read_bytes()))
    data = tmp_path / "device"
    data.mkdir()
    save_identity(data, identity_at(desk))
    device = Device(data, inference_listen="127.0.0.1:0", disk_reserve_bytes="0")
    await asyncio.to_thread(device.start)
    await eventually(lambda: bool(device.models()), "the release is served")
    yield device
    await asyncio.to_thread(device.close)


async def test_threads_and_coroutines_get_the_same_answer_as_callers_over_http(device: Device) -> None:
    inputs = {"bytes": ROWS}
    here = await asyncio.to_thread(device.infer, MODEL, inputs)
    there = await device.infer_async(MODEL, inputs, ["target_label"], version="1.0.0", priority=1, timeout_s=30)
    assert here.version == there.version == "1.0.0"
    np.testing.assert_array_equal(here.outputs["target_label"], there.outputs["target_label"])
    assert device.inference_url.startswith("http://127.0.0.1:")
    assert device.status()["device"] == DEVICE


async def test_many_callers_of_both_kinds_are_all_answered(device: Device) -> None:
    inputs = {"bytes": ROWS[:1]}
    threads = [asyncio.to_thread(device.infer, MODEL, inputs) for _ in range(20)]
    coroutines = [device.infer_async(MODEL, inputs) for _ in range(20)]
    answers = await asyncio.gather(*threads, *coroutines)
    first = answers[0].outputs["target_label"]
    for answer in answers:
        np.testing.assert_allclose(answer.outputs["target_label"], first, rtol=1e-4, atol=1e-6)


async def test_while_requests_are_divided_a_caller_says_who_shall_answer_it(
    device: Device, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    inputs = {"bytes": ROWS[:1]}
    assert device.infer(MODEL, inputs, side="candidate").version == "1.0.0", "there is no other side yet"
    split = Split(share=0.5)
    desk.order(desk.release("2.0.0", real_models[1].read_bytes(), split=split, probation_s=3600))
    await eventually(lambda: len(device.models()) == 2, "the next release is on trial")
    sides: tuple[tuple[Literal["candidate", "stable"], str], ...] = (("candidate", "2.0.0"), ("stable", "1.0.0"))
    for side, version in sides:
        here = await asyncio.to_thread(device.infer, MODEL, inputs, side=side)
        there = await device.infer_async(MODEL, inputs, side=side)
        assert here.version == there.version == version
    callers = {key: {device.infer(MODEL, inputs, key=key).version for _ in range(3)} for key in map(str, range(20))}
    assert all(len(versions) == 1 for versions in callers.values())
    assert set().union(*callers.values()) == {"1.0.0", "2.0.0"}
    assert device.status()["traffic"][MODEL]["candidate"]["requests"] >= 2


async def test_wrong_input_is_named_and_costs_nothing(device: Device) -> None:
    with pytest.raises(InvalidInput, match=r"inputs\.bytes"):
        device.infer(MODEL, {"bytes": ROWS.astype(np.float32)})
    with pytest.raises(NotFound, match="not served here"):
        await device.infer_async("other", {"bytes": ROWS})
    assert device.infer(MODEL, {"bytes": ROWS}).version == "1.0.0"


async def test_what_was_cancelled_while_it_waited_leaves_no_trace(device: Device) -> None:
    waiting = [asyncio.create_task(device.infer_async(MODEL, {"bytes": ROWS})) for _ in range(40)]
    await asyncio.sleep(0)
    for task in waiting[::2]:
        task.cancel()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    assert {answer.version for answer in answers[1::2] if not isinstance(answer, BaseException)} == {"1.0.0"}


async def test_a_folder_has_one_agent_and_a_closed_one_can_be_started_again(device: Device, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="uses"):
        await asyncio.to_thread(Device(tmp_path / "device", inference_listen="127.0.0.1:0").start)
    with pytest.raises(Conflict, match="runs already"):
        device.start()
    await asyncio.to_thread(device.close)
    with pytest.raises(Conflict, match="does not run"):
        device.infer(MODEL, {"bytes": ROWS})
    await asyncio.to_thread(device.start)
    assert device.infer(MODEL, {"bytes": ROWS}).version == "1.0.0"


def test_a_device_that_has_not_joined_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="ferry-agent join"), Device(tmp_path):
        pass


async def test_the_examples_of_the_how_to_page_print_what_it_says(device: Device, tmp_path: Path) -> None:
    await asyncio.to_thread(device.close)
    page = (Path(__file__).parents[2] / "docs/how-to/embed-the-agent.md").read_text()
    examples = re.findall(r"```python\n(.*?)```\n\n?(?:```text\n(.*?)```)", page, re.DOTALL)
    variables = {"FERRY_AGENT_DATA": str(tmp_path / "device"), "FERRY_AGENT_INFERENCE_LISTEN": "127.0.0.1:0"}
    for code, expected in examples:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code.replace("magika", MODEL),
            stdout=PIPE,
            stderr=PIPE,
            env={**os.environ, **variables},
        )
        out, err = await child.communicate()
        assert (out.decode(), child.returncode) == (expected, 0), err.decode()
    assert len(examples) == 2
