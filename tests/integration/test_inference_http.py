"""The device's inference API as its clients see it: tritonclient with its defaults, and raw HTTP for the rest."""

import asyncio
import gzip
import json
import re
import shutil
import socket
import sys
import zlib
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

from common.artifact import TensorSpec
from common.clock import SystemClock
from common.errors import Unavailable
from common.ids import ModelName, Version
from edge_agent.inference.bodies import BodyLimits
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.ort import OrtEngine, OrtSession
from edge_agent.inference.requests import Overloaded
from edge_agent.inference.serving import ModelServer
from edge_agent.inference.web import Application
from edge_agent.telemetry.recorder import Recorder
from tests.conftest import eventually
from tests.integration.small_models import MODEL, Bench, adder, identity, nan_unless_zero, raises_unless_zero

ROOT = Path(__file__).parent.parent.parent
MAGIKA = ModelName("magika")
LIMITS = BodyLimits(body_bytes_max=200_000, bodies_bytes_max=300_000)


class Device(NamedTuple):
    """A listening inference API, its server of small models, and an HTTP session."""

    bench: Bench
    url: str
    http: aiohttp.ClientSession

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status and JSON document of one request."""
        async with self.http.request(method, self.url + path, **options) as response:
            assert response.content_type == "application/json"
            return response.status, json.loads(await response.read())

    async def infer(self, document: Any, **options: Any) -> tuple[int, Any]:
        return await self.call("POST", f"/v2/models/{MODEL}/infer", json=document, **options)

    async def triton(self, act: Callable[[triton.InferenceServerClient], Any]) -> Any:
        """What a tritonclient answers. It is made, used and closed in one thread, which its greenlets cannot leave."""

        def session() -> Any:
            with triton.InferenceServerClient(self.url.removeprefix("http://")) as client:
                return act(client)

        return await asyncio.to_thread(session)


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    bench = Bench(tmp_path, workers=1, queue=1)
    await bench.add(1)
    listener = await listen(inference_app(bench.server, lambda: {"generation": 7}, LIMITS), "127.0.0.1", 0)
    async with aiohttp.ClientSession() as http:
        yield Device(bench, listener.url, http)
    bench.engine.open.set()
    await listener.close()
    await bench.server.close()


class Magika(NamedTuple):
    """A listening inference API that serves the older of the two real models, and both of them raw."""

    server: ModelServer
    address: str
    raw: tuple[OrtSession, OrtSession]
    paths: tuple[Path, Path]

    def expected(self, which: int, batch: np.ndarray) -> np.ndarray:
        return self.raw[which].run({"bytes": batch}, ["target_label"])["target_label"]

    async def switch(self, which: int) -> None:
        raw = self.raw[which]
        candidate = await self.server.prepare(MAGIKA, Version(str(which)), self.paths[which], raw.inputs, raw.outputs)
        self.server.switch(candidate)


@pytest.fixture
async def magika(real_models: tuple[Path, Path]) -> AsyncIterator[Magika]:
    server = ModelServer(OrtEngine(), Recorder(0.0), SystemClock())
    listener = await listen(inference_app(server), "127.0.0.1", 0)
    raw = OrtEngine().load(real_models[0]), OrtEngine().load(real_models[1])
    magika = Magika(server, listener.url.removeprefix("http://"), raw, real_models)
    await magika.switch(0)
    await server.commit(MAGIKA)
    yield magika
    await listener.close()
    await server.close()


def batch_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 257, (rows, 2048), np.int32)


def tensor(array: np.ndarray, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("bytes", list(array.shape), "INT32")
    return tensor.set_data_from_numpy(array, binary_data=binary)


async def test_tritonclient_gets_metadata_configuration_statistics_and_a_correct_inference(magika: Magika) -> None:
    batch = batch_of(2)

    def session() -> dict[str, Any]:
        client = triton.InferenceServerClient(magika.address)
        answer = client.infer("magika", [tensor(batch)], request_id="r-1")
        found = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": client.is_model_ready("magika"),
            "other_ready": client.is_model_ready("other"),
            "other_version_ready": client.is_model_ready("magika", "9"),
            "server": client.get_server_metadata(),
            "model": client.get_model_metadata("magika"),
            "version": client.get_model_metadata("magika", "0"),
            "config": client.get_model_config("magika"),
            "stats": client.get_inference_statistics("magika"),
            "all_stats": client.get_inference_statistics(),
            "index": client.get_model_repository_index(),
            "answer": answer.get_response(),
            "labels": answer.as_numpy("target_label"),
        }
        client.close()
        return found

    found = await asyncio.to_thread(session)
    np.testing.assert_array_equal(found["labels"], magika.expected(0, batch))
    assert (found["answer"]["id"], found["answer"]["model_version"]) == ("r-1", "0")
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
    assert (found["other_ready"], found["other_version_ready"]) == (False, False)
    assert "binary_tensor_data" in found["server"]["extensions"]
    assert found["model"] == found["version"]
    assert found["model"]["inputs"] == [{"name": "bytes", "datatype": "INT32", "shape": [-1, 2048]}]
    assert found["model"]["versions"] == ["0"]
    assert found["config"]["input"] == [{"name": "bytes", "data_type": "TYPE_INT32", "dims": [-1, 2048]}]
    assert found["config"]["max_batch_size"] == 0
    (stats,) = found["stats"]["model_stats"]
    assert (stats["name"], stats["version"], stats["inference_count"]) == ("magika", "0", 1)
    assert stats["inference_stats"]["success"]["ns"] > 0
    assert found["all_stats"] == found["stats"]
    assert found["index"] == [{"name": "magika", "version": "0", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_asyncio_tritonclient_with_json_binary_and_compression(magika: Magika, compression: str | None) -> None:
    batch = batch_of(5)
    expected = magika.expected(0, batch)
    async with triton_aio.InferenceServerClient(magika.address) as client:
        for binary_in in (True, False):
            for outputs in (None, [triton_aio.InferRequestedOutput("target_label", binary_data=False)]):
                answer = await client.infer(
                    "magika",
                    [tensor(batch, binary_in)],
                    outputs=outputs,
                    request_compression_algorithm=compression,
                    response_compression_algorithm=compression,
                )
                np.testing.assert_array_equal(answer.as_numpy("target_label"), expected)


async def test_callers_over_http_see_no_failure_and_one_release_at_a_time_while_real_models_swap(
    magika: Magika,
) -> None:
    batch = batch_of(1)
    expected = {"0": magika.expected(0, batch), "1": magika.expected(1, batch)}
    seen: list[str] = []
    done = False

    async def client() -> None:
        async with triton_aio.InferenceServerClient(magika.address) as api:
            while not done:
                answer = await api.infer("magika", [tensor(batch)])
                version = answer.get_response()["model_version"]
                np.testing.assert_array_equal(answer.as_numpy("target_label"), expected[version])
                seen.append(version)
                await asyncio.sleep(0.01)  # a load at the lowest priority needs some idle time to get anywhere

    clients = [asyncio.create_task(client()) for _ in range(2)]
    for swap in range(1, 6):
        await magika.switch(swap % 2)
        before = len(seen)
        await eventually(lambda before=before: len(seen) > before + 3, "traffic on the new release")  # type: ignore[misc]
        await magika.server.commit(MAGIKA)
    done = True
    await asyncio.gather(*clients)
    assert set(seen) == {"0", "1"}


async def test_the_fleet_not_the_caller_decides_what_is_loaded(device: Device) -> None:
    for act in (triton.InferenceServerClient.load_model, triton.InferenceServerClient.unload_model):
        with pytest.raises(InferenceServerException, match=r"\[403\].*controller decides.*rollout"):
            await device.triton(lambda client, act=act: act(client, str(MODEL)))  # type: ignore[misc]


@pytest.mark.parametrize("broken", [nan_unless_zero, raises_unless_zero])
async def test_a_release_that_fails_in_probation_is_covered_by_the_old_one(device: Device, broken: Any) -> None:
    await device.bench.put("2", broken)
    document = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [[1, 2, 3, 4]]}]}
    status, answer = await device.infer(document)
    assert (status, answer["model_version"]) == (200, "1")
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0, 3.0, 4.0, 5.0]}]
    _, index = await device.call("POST", "/v2/repository/index")
    assert [(one["version"], one["reason"]) for one in index] == [
        ("2", "in probation"),
        ("1", "stands by while its successor is in probation"),
    ]
    status, answer = await device.call("POST", f"/v2/models/{MODEL}/versions/1/infer", json=document)
    assert (status, answer["model_version"]) == (200, "1")


ONE_ROW = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"inputs": []}, ["inputs.x", "missing", "FP32 [any, 4]"]),
        ({"inputs": [{**ONE_ROW, "name": "w"}]}, ["inputs.w", "no such input", "it takes x"]),
        ({"inputs": [{**ONE_ROW, "shape": [2, 2]}]}, ["inputs.x", "FP32 [2, 2]", "FP32 [any, 4]"]),
        ({"inputs": [{**ONE_ROW, "datatype": "INT32"}]}, ["inputs.x", "INT32 [1, 4]", "FP32 [any, 4]"]),
        ({"inputs": [{**ONE_ROW, "data": [1, 2, 3]}]}, ["inputs.x", "3 elements", "4 elements of FP32"]),
        ({"inputs": [{**ONE_ROW, "data": ["a", 2, 3, 4]}]}, ["inputs.x", "not all FP32"]),
        ({"inputs": [ONE_ROW], "outputs": [{"name": "z"}]}, ["outputs.z", "no such output", "it has y"]),
        ({"inputs": [ONE_ROW], "parameters": {"sequence_id": 4}}, ["parameters.sequence_id", "not supported"]),
        ({"inputs": [{**ONE_ROW, "shape": ["1", 4]}]}, ["$.inputs[0].shape[0]", "int"]),
        ({"input": [ONE_ROW]}, ["missing required field", "inputs"]),
        ([1], ["Expected `object`"]),
    ],
)
async def test_bad_input_names_the_tensor_and_the_expectation(device: Device, document: Any, words: list[str]) -> None:
    status, answer = await device.infer(document)
    assert status == 400
    assert [word for word in words if word not in answer["error"]] == []
    assert (await device.infer({"inputs": [ONE_ROW]}))[0] == 200


async def test_bad_paths_and_bodies_get_the_right_status_and_a_json_error(device: Device) -> None:
    path = f"/v2/models/{MODEL}/infer"
    cases: list[tuple[str, str, dict[str, Any], int]] = [
        ("GET", "/v2/models/other", {}, 404),
        ("POST", "/v2/models/other/infer", {"data": b"x"}, 404),
        ("GET", f"/v2/models/{MODEL}/versions/9/config", {}, 404),
        ("GET", "/v2/nothing", {}, 404),
        ("DELETE", f"/v2/models/{MODEL}", {}, 405),
        ("POST", path, {"data": b"{"}, 400),
        ("POST", path, {"data": b'{"inputs": [{"name": "x", "data": ' + b"[" * 100_000}, 400),
        ("POST", path, {"data": b"{}", "headers": {"Inference-Header-Content-Length": "3"}}, 400),
        ("POST", path, {"data": b"{}", "headers": {"Inference-Header-Content-Length": "-1"}}, 400),
        ("POST", path, {"data": b"\0" * 200_001}, 413),
        ("POST", path, {"data": gzip.compress(b"\0" * 10_000_000), "headers": {"Content-Encoding": "gzip"}}, 413),
        ("POST", path, {"data": b"not gzip", "headers": {"Content-Encoding": "gzip"}}, 400),
    ]
    for method, where, options, expected in cases:
        status, answer = await device.call(method, where, **options)
        assert (status, list(answer)) == (expected, ["error"]), (method, where)
    document = {"inputs": [ONE_ROW]}
    packed = zlib.compress(json.dumps(document).encode())
    assert (await device.call("POST", path, data=packed, headers={"Content-Encoding": "deflate"}))[0] == 200


async def test_json_cannot_carry_a_nan_and_says_how_to_get_it(device: Device) -> None:
    await device.bench.put("2", nan_unless_zero)
    await device.bench.server.commit(MODEL)
    status, answer = await device.infer({"inputs": [ONE_ROW]})
    assert status == 400
    assert "outputs.y" in answer["error"]
    assert "binary_data" in answer["error"]
    row = triton.InferInput("x", [1, 4], "FP32").set_data_from_numpy(np.ones((1, 4), np.float32))
    answer = await device.triton(lambda client: client.infer(str(MODEL), [row]))
    assert np.isnan(answer.as_numpy("y")).all()


async def test_an_engine_failure_is_the_servers_error(device: Device) -> None:
    await device.bench.put("2", raises_unless_zero)
    await device.bench.server.commit(MODEL)
    status, answer = await device.infer({"inputs": [ONE_ROW]})
    assert status == 500
    assert "the model failed" in answer["error"]


async def test_a_full_queue_is_503_with_retry_after_and_nothing_is_lost(device: Device) -> None:
    arrived = device.bench.engine.arrived
    device.bench.engine.open.clear()
    accepted = [asyncio.create_task(device.bench.ask())]
    await eventually(lambda: device.bench.engine.arrived > arrived, "the one worker is busy")
    accepted.append(asyncio.create_task(device.bench.ask()))  # one place in the queue
    await asyncio.sleep(0)
    path = f"{device.url}/v2/models/{MODEL}/infer"
    async with device.http.post(path, json={"inputs": [{**ONE_ROW, "name": "other"}]}) as response:
        assert response.status == 400  # bad input is told at once, also by a busy server
    async with device.http.post(path, json={"inputs": [ONE_ROW]}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
    device.bench.engine.open.set()
    assert await asyncio.gather(*accepted) == [(1.0, "1")] * 2
    assert (await device.infer({"inputs": [ONE_ROW]}))[0] == 200


async def test_a_request_with_a_time_limit_is_504_when_it_could_not_be_started(device: Device) -> None:
    arrived = device.bench.engine.arrived
    device.bench.engine.open.clear()
    first = asyncio.create_task(device.bench.ask())
    await eventually(lambda: device.bench.engine.arrived > arrived, "the one worker is busy")
    second = asyncio.create_task(device.infer({"inputs": [ONE_ROW], "parameters": {"timeout": 1000, "priority": 2}}))
    await asyncio.sleep(0.05)
    device.bench.engine.open.set()
    await first
    status, answer = await second
    assert (status, "its time was up" in answer["error"]) == (504, True)
    for name, value in (("priority", 10), ("priority", "high"), ("timeout", -1), ("timeout", 0.5)):
        status, answer = await device.infer({"inputs": [ONE_ROW], "parameters": {name: value}})
        assert (status, f"parameters.{name}" in answer["error"]) == (400, True)


async def test_tritonclients_priority_and_timeout_are_understood(device: Device) -> None:
    row = triton.InferInput("x", [1, 4], "FP32").set_data_from_numpy(np.ones((1, 4), np.float32))
    answer = await device.triton(lambda client: client.infer(str(MODEL), [row], priority=1, timeout=5_000_000))
    assert answer.as_numpy("y").tolist() == [[2.0] * 4]


async def test_a_caller_who_leaves_takes_the_waiting_request_along(device: Device) -> None:
    arrived = device.bench.engine.arrived
    device.bench.engine.open.clear()
    first = asyncio.create_task(device.bench.ask())
    await eventually(lambda: device.bench.engine.arrived > arrived, "the one worker is busy")
    with pytest.raises(TimeoutError):
        await device.infer({"inputs": [ONE_ROW]}, timeout=aiohttp.ClientTimeout(total=0.1))
    for _ in range(100):  # the only place in the queue is free again once the server has noticed
        second = asyncio.create_task(device.bench.ask())
        await asyncio.sleep(0.1)
        if not second.done():
            break
        assert isinstance(second.exception(), Overloaded)
    device.bench.engine.open.set()
    assert await second == (1.0, "1")
    await first
    assert device.bench.engine.arrived == arrived + 2


async def test_a_unix_socket_answers_beside_the_port_and_leaves_nothing(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "inference.sock"
    for _ in range(2):
        listener = await listen(inference_app(device.bench.server), "127.0.0.1", 0, path)
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http,
            http.get("http://device/v2/health/live") as response,
        ):
            assert await response.json() == {"live": True}
        assert path.stat().st_mode & 0o777 == 0o660
        await listener.close()
        assert not path.exists()
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.close()
    await (await listen(inference_app(device.bench.server), "127.0.0.1", 0, path)).close()
    path.write_text("no socket")
    with pytest.raises(Unavailable, match="choose another path"):
        await listen(inference_app(device.bench.server), "127.0.0.1", 0, path)
    assert path.read_text() == "no socket"


async def test_bodies_that_are_in_memory_at_one_time_are_bounded_together(device: Device) -> None:
    """Two callers who are slow to send 180 kB each: the second is refused when 300 kB are held."""
    hold = asyncio.Event()

    async def slowly(size: int) -> AsyncIterator[bytes]:
        yield b"x" * size
        await hold.wait()

    path = f"{device.url}/v2/models/{MODEL}/infer"
    first = asyncio.create_task(device.http.post(path, data=slowly(180_000)).__aenter__())
    second = asyncio.create_task(device.http.post(path, data=slowly(180_000)).__aenter__())
    done, _ = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED, timeout=30)
    hold.set()
    statuses = sorted([(await first).status, (await second).status])
    assert len(done) == 1
    assert statuses == [400, 503]
    for _ in range(4):  # what was held is given back, also after an error
        assert (await device.infer({"inputs": ["x" * 100_000]}))[0] == 400
    assert (await device.infer({"inputs": [ONE_ROW]}))[0] == 200
    assert sum(window.refused for window in device.bench.recorder.cut(1.0)) == 1


async def test_strings_travel_as_json_and_as_bytes(device: Device) -> None:
    words = TensorSpec("x", "BYTES", (-1,)), TensorSpec("y", "BYTES", (-1,))
    path = identity(device.bench.folder / "words.onnx", TensorProto.STRING, ("n",))
    name = ModelName("words")
    server = device.bench.server
    server.switch(await server.prepare(name, Version("1"), path, words[:1], words[1:]))
    texts = ["", "Fähre", "日本", "x" * 300]
    document = {"inputs": [{"name": "x", "shape": [4], "datatype": "BYTES", "data": texts}]}
    status, answer = await device.call("POST", "/v2/models/words/infer", json=document)
    assert (status, answer["outputs"][0]["data"]) == (200, texts)
    array = np.array([text.encode() for text in texts], np.object_)
    sent = triton.InferInput("x", [4], "BYTES").set_data_from_numpy(array)
    found = await device.triton(lambda client: client.infer("words", [sent]))
    assert [text.decode() for text in found.as_numpy("y")] == texts


async def test_a_list_of_codings_is_not_a_wish_for_compression_and_one_coding_is(device: Device) -> None:
    rows = {"name": "x", "shape": [500, 4], "datatype": "FP32", "data": [0.5] * 2000}
    path = f"{device.url}/v2/models/{MODEL}/infer"
    for wish, expected in (("gzip, deflate, br", None), ("gzip", "gzip"), ("deflate", "deflate")):
        async with device.http.post(path, json={"inputs": [rows]}, headers={"Accept-Encoding": wish}) as response:
            assert response.headers.get("Content-Encoding") == expected
            assert (await response.json())["outputs"][0]["shape"] == [500, 4]


async def test_status_is_what_the_agent_says_and_absent_without_one(device: Device) -> None:
    assert await device.call("GET", "/status") == (200, {"generation": 7})
    listener = await listen(inference_app(device.bench.server), "127.0.0.1", 0)
    async with device.http.get(f"{listener.url}/status") as response:
        assert response.status == 404
    await listener.close()


async def test_a_stopping_server_says_that_it_is_not_ready(device: Device) -> None:
    await device.bench.server.close()
    assert await device.call("GET", "/v2/health/ready") == (400, {"ready": False})
    assert await device.call("GET", "/v2/health/live") == (200, {"live": True})


async def test_a_port_that_is_taken_is_a_clear_error(device: Device) -> None:
    port = int(device.url.rpartition(":")[2])
    with pytest.raises(Unavailable, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*choose another port"):
        await listen(Application(), "127.0.0.1", port)


async def test_a_later_release_is_served_to_the_same_connection(device: Device) -> None:
    await device.bench.put("2", lambda path: adder(path, 2))
    await device.bench.server.commit(MODEL)
    _, answer = await device.infer({"id": "a", "inputs": [ONE_ROW]})
    assert (answer["id"], answer["model_version"], answer["outputs"][0]["data"]) == ("a", "2", [3.0, 4.0, 5.0, 6.0])


async def test_every_route_is_in_the_reference(device: Device) -> None:
    page = (ROOT / "docs/reference/inference-api.md").read_text()
    application = inference_app(device.bench.server, dict)
    paths = set(application.paths)
    documented = {path for path in paths if f" {path}`" in page or f"`{path}`" in page}
    versioned = {path for path in paths if "/versions/{version}" in path}
    loads = {path for path in paths if path.startswith("/v2/repository/models/")}
    assert paths - documented - versioned - loads == set()
    assert {path.replace("/versions/{version}", "") for path in versioned} <= documented
    assert loads


async def test_the_examples_of_the_how_to_page_work(magika: Magika) -> None:
    if not shutil.which("curl"):
        pytest.skip("the page's examples use curl, which is not installed")
    page = (ROOT / "docs/how-to/call-a-model.md").read_text().replace("127.0.0.1:8500", magika.address)
    blocks = re.findall(r"```(sh|python|json)\n(.*?)```", page, re.DOTALL)
    printed = ""
    for language, text in blocks:
        if language == "json":  # what the block before it has printed
            assert json.loads(printed).keys() == json.loads(text).keys()
            continue
        if text.startswith("pip "):
            continue
        command = ["bash", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        child = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
        printed = (await child.communicate())[0].decode()
        assert child.returncode == 0, printed
    assert len(blocks) == 6
