"""While a candidate is in probation it answers a share of the requests: by chance, by key, by what a request says."""

import asyncio
import json
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from msgspec import UNSET, UnsetType

from common.errors import NotFound
from common.ids import Version
from common.wire import DesiredModel, Split, SplitReport
from edge_agent.inference.health import Limits
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.requests import Terms
from edge_agent.inference.sides import NO_WISH, Wish
from tests.conftest import eventually
from tests.integration.agent_bench import Device, device_at
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import adder, nan_unless_zero, renamed_output

HALF = Split(share=0.5, header="X-Model-Side", key="X-Caller")
FEEDS = {"x": np.ones((1, 4), np.float32)}
DOCUMENT = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


@pytest.fixture
async def device(tmp_path: Path, desk: ReleaseDesk) -> AsyncIterator[Device]:
    """A device that runs version 1, which adds 1."""
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(added(desk, tmp_path, 1)))
        await device.finished(1)
        yield device


def added(
    desk: ReleaseDesk, folder: Path, number: int, split: Split | UnsetType = UNSET, probation_s: float = 0.1
) -> DesiredModel:
    """The order for a release that adds its version."""
    data = adder(folder / "made.onnx", number).read_bytes()
    return desk.release(str(number), data, split=split, probation_s=probation_s)


async def on_trial(device: Device) -> None:
    await eventually(lambda: device.model and device.model.phase == "probation", "it is in probation")


async def answers(device: Device, count: int, wish: Wish = NO_WISH) -> Counter[str]:
    """Who answered; the answer itself must be of the release that it names."""
    seen: Counter[str] = Counter()
    for _ in range(count):
        answer = await device.server.infer(MODEL, None, FEEDS, terms=Terms(wish=wish))
        assert answer.outputs["y"][0, 0] == 1 + int(answer.version)
        seen[answer.version] += 1
    return seen


async def test_the_candidate_answers_its_share_and_a_widened_one_from_the_next_request_on(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, Split(share=0.25), 3600)))
    await on_trial(device)
    seen = await answers(device, 400)
    assert 50 < seen["2"] < 160
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, Split(share=1), 3600)))
    await eventually(lambda: (s := device.server.split(MODEL)) and s.share == 1, "it is divided anew")
    assert await answers(device, 20) == {"2": 20}
    assert device.model
    assert (device.model.phase, device.model.running) == ("probation", "2")


async def test_a_request_decides_for_itself_and_a_caller_stays_where_it_is(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, HALF, 3600)))
    await on_trial(device)
    assert await answers(device, 20, Wish("candidate")) == {"2": 20}
    assert await answers(device, 20, Wish("stable")) == {"1": 20}
    callers = [await answers(device, 5, Wish(key=f"caller-{number}")) for number in range(40)]
    assert all(len(seen) == 1 for seen in callers)
    assert 8 < sum(seen["2"] == 5 for seen in callers) < 32
    for version in ("1", "2"):
        answer = await device.server.infer(MODEL, Version(version), FEEDS, terms=Terms(wish=Wish("candidate")))
        assert answer.version == version, "a request that names a version gets it"
    with pytest.raises(NotFound):
        await device.server.infer(MODEL, Version("3"), FEEDS)


async def test_when_the_time_is_up_the_candidate_answers_everything_and_the_report_has_both_sides(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    assert await answers(device, 10) == {"1": 10}, "what came before the switch is not part of it"
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, Split(share=0.5), 3600)))
    await on_trial(device)
    seen = await answers(device, 100)
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, Split(share=0.5), 0)))  # a newer order ends it
    update = await device.finished(3)
    assert update.outcome == "succeeded"
    assert update.split
    assert (update.split.candidate.requests, update.split.stable.requests) == (seen["2"], seen["1"])
    assert update.split.candidate.latency_s
    assert update.split.stable.latency_s
    assert await answers(device, 10, Wish("stable")) == {"2": 10}
    assert device.server.split(MODEL) is None


async def test_the_candidate_is_judged_by_what_it_answered_and_the_proven_release_stands_in_for_it(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    data = nan_unless_zero(tmp_path / "bad.onnx").read_bytes()
    bad = desk.release("2", data, split=Split(share=0.5), probation_s=3600)
    await device.executor.accept(desk.order(bad))
    await on_trial(device)
    seen: Counter[str] = Counter()
    while device.model and device.model.phase == "probation":
        seen += await answers(device, 1)
        await asyncio.sleep(0)
    update = await device.finished(2)
    assert (update.outcome, update.reason) == ("rolled_back", "unhealthy")
    assert update.split
    assert update.split.candidate.errors >= Limits().errors_min
    assert update.split.stable.errors == 0
    assert set(seen) == {"1"}


async def test_with_too_few_requests_of_its_own_the_agent_asks_the_candidate(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    only_who_asks = Split(share=0, header="x-side")
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, only_who_asks, 0.5)))
    await on_trial(device)
    assert await answers(device, 30) == {"1": 30}
    update = await device.finished(2)
    assert update.outcome == "succeeded"
    assert update.split
    assert update.split.candidate.requests == 0
    assert update.split.candidate.latency_s is None


async def test_a_release_with_other_outputs_is_not_shared_with_one_that_cannot_take_its_requests(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    data = renamed_output(tmp_path / "other.onnx").read_bytes()
    await device.executor.accept(desk.order(desk.release("2", data, split=Split(share=0.5), probation_s=3600)))
    await on_trial(device)
    zeros = {"x": np.zeros((1, 4), np.float32)}
    seen = {(await device.server.infer(MODEL, None, zeros)).version for _ in range(20)}
    assert seen == {"2"}


async def test_over_http_by_header_by_parameter_and_by_key(device: Device, desk: ReleaseDesk, tmp_path: Path) -> None:
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, HALF, 3600)))
    await on_trial(device)
    listener = await listen(inference_app(device.server), "127.0.0.1", 0)
    async with aiohttp.ClientSession() as http:

        async def ask(headers: dict[str, str], parameters: dict[str, Any] | None = None) -> str:
            document = DOCUMENT | {"parameters": parameters or {}}
            url = f"{listener.url}/v2/models/{MODEL}/infer"
            async with http.post(url, json=document, headers=headers) as response:
                answer = await response.json()
                assert response.status == 200, answer
                version = str(answer["model_version"])
                assert answer["outputs"][0]["data"] == [1 + int(version)] * 4
                return version

        for side, version in (("candidate", "2"), ("stable", "1")):
            assert {await ask({"x-model-side": side}) for _ in range(10)} == {version}
            assert {await ask({}, {"X-Model-Side": side}) for _ in range(10)} == {version}
        assert await ask({"X-Model-Side": "stable"}, {"X-Model-Side": "candidate"}) == "1", "the header comes first"
        assert {await ask({"X-Model-Side": "neither"}) for _ in range(30)} == {"1", "2"}
        for caller in ("a", "b", "c", "d"):
            by_header = {await ask({"X-Caller": caller}) for _ in range(5)}
            by_parameter = {await ask({}, {"X-Caller": caller}) for _ in range(5)}
            assert len(by_header) == 1
            assert by_header == by_parameter
        async with http.get(f"{listener.url}/v2/models/{MODEL}/stats") as response:
            stats = (await response.json())["model_stats"]
        assert [(one["version"], one["inference_count"] > 20) for one in stats] == [("2", True), ("1", True)]
    await listener.close()
    (sides,) = device.server.traffic().values()
    assert isinstance(sides, SplitReport)
    assert sides.candidate.requests + sides.stable.requests == sum(one["inference_count"] for one in stats)


async def test_the_request_of_the_how_to_page_reaches_the_candidate(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    if not shutil.which("curl"):
        pytest.skip("the page's example uses curl, which is not installed")
    await device.executor.accept(desk.order(added(desk, tmp_path, 2, HALF, 3600)))
    await on_trial(device)
    listener = await listen(inference_app(device.server), "127.0.0.1", 0)
    (tmp_path / "request.json").write_text(json.dumps(DOCUMENT))
    page = (Path(__file__).parents[2] / "docs/how-to/shadow-and-ab.md").read_text()
    (command,) = re.findall(r"^curl .*$", page, re.MULTILINE)
    command = command.replace("127.0.0.1:8500", listener.url.removeprefix("http://")).replace("detector", MODEL)
    for side, version in (("candidate", "2"), ("stable", "1")):
        text = command.replace("candidate", side)
        child = await asyncio.create_subprocess_exec("bash", "-c", text, cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
        assert json.loads((await child.communicate())[0])["model_version"] == version
    await listener.close()


async def test_after_a_crash_the_requests_are_divided_again(tmp_path: Path, desk: ReleaseDesk) -> None:
    crashing = Device(tmp_path, desk)
    await crashing.executor.start()
    await crashing.executor.accept(desk.order(added(desk, tmp_path, 1)))
    await crashing.finished(1)
    await crashing.executor.accept(desk.order(added(desk, tmp_path, 2, HALF, 3600)))
    await on_trial(crashing)
    await crashing.die()
    async with device_at(tmp_path, desk) as device:
        await on_trial(device)
        assert set(await answers(device, 40)) == {"1", "2"}
