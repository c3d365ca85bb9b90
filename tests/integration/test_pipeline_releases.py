"""What a device does with a release that has steps around its model, from the order to the answer."""

import asyncio
import io
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from common.artifact import TensorSpec, Variant
from common.artifact.pipeline import Pipeline, PipelineStep
from common.artifact.samples import Sample, encode_samples
from common.artifact.selftest import SAMPLES_FILE, Exact, SelfTest
from common.clock import SystemClock
from common.errors import InvalidInput
from common.ids import Version
from common.pipelines import installed
from common.pipelines.installed import digest_of_plugin, find_plugin
from edge_agent.inference.descriptions import model_metadata
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.opening import Extras
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.inference.trial import ModelRejected
from edge_agent.telemetry.recorder import Recorder
from tests.conftest import eventually
from tests.integration.agent_bench import device_at
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import X, Y, adder, channel_means
from tests.plugin_wheels import make_wheel, unpack

LABELS = [f"class {number}" for number in range(4)]
TOP = PipelineStep(plugin="edgeferry.top_k", version="1", parameters={"k": 1, "labels": LABELS})
TOPPED = (
    TensorSpec("top_indices", "INT64", (-1, 1)),
    TensorSpec("top_scores", "FP32", (-1, 1)),
    TensorSpec("top_labels", "BYTES", (-1, 1)),
)
ROW = np.array([[0, 5, 1, 2]], np.float32)


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from; what was imported from it is forgotten again."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(installed, "_imported", {})
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        monkeypatch.delitem(sys.modules, name)
    return site


def plugged(tmp_path: Path, site: Path, **wheel: Any) -> PipelineStep:
    """The plug-in `acme.add`, installed, as a step that adds 10."""
    unpack(make_wheel(tmp_path, **wheel), site)
    code = (digest_of_plugin(find_plugin("acme.add")),)
    return PipelineStep(plugin="acme.add", version="1.0", code=code, parameters={"amount": 10})


def uninstalled(site: Path) -> Callable[[], object]:
    """Take everything out of the folder; what puts it back."""
    elsewhere = site.rename(site.with_name("elsewhere"))
    return lambda: elsewhere.rename(site)


def piped(before: tuple[PipelineStep, ...] = (), after: tuple[PipelineStep, ...] = ()) -> Pipeline:
    return Pipeline(model_inputs=X, model_outputs=Y, before=before, after=after)


def dressed(pipeline: Pipeline, outputs: tuple[TensorSpec, ...] = Y) -> Callable[[Variant], Variant]:
    return lambda variant: replace(variant, outputs=outputs, pipeline=pipeline)


def server_of(**options: Any) -> ModelServer:
    return ModelServer(OrtEngine(), Recorder(0.0), SystemClock(), **options)


async def serve(
    server: ModelServer, model: Path, pipeline: Pipeline | None, outputs: tuple[TensorSpec, ...] = Y, version: str = "1"
) -> None:
    """Switch to that release, without committing."""
    extras = Extras(pipeline)
    server.switch(await server.prepare(MODEL, Version(version), model, X, outputs, extras=extras))


async def test_callers_see_the_outer_tensors_and_get_what_the_last_step_makes(tmp_path: Path, site: Path) -> None:
    server = server_of()
    add = plugged(tmp_path, site)
    await serve(server, adder(tmp_path / "m.onnx", 1), piped((add,), (TOP,)), TOPPED)
    answer = await server.infer(MODEL, None, {"x": ROW})
    assert answer.outputs["top_labels"].tolist() == [["class 1"]]
    assert answer.outputs["top_scores"].tolist() == [[16.0]]
    some = await server.infer(MODEL, None, {"x": ROW}, ["top_indices"])
    assert some.outputs.keys() == {"top_indices"}
    metadata = model_metadata(server.served(MODEL), ["1"], server.platform)
    assert (metadata["inputs"], metadata["outputs"]) == (X, TOPPED)
    await server.close()


async def test_a_release_waits_for_its_plugin_and_goes_on_when_it_is_installed(
    tmp_path: Path, site: Path, desk: ReleaseDesk
) -> None:
    step = plugged(tmp_path, site)
    install_again = uninstalled(site)
    model = adder(tmp_path / "m.onnx", 1).read_bytes()
    release = desk.release("1", model, dress=dressed(piped((step,))))
    async with device_at(tmp_path / "device", desk) as device:
        await device.executor.accept(desk.order(release))
        await eventually(lambda: device.model and "plugin_missing: acme.add" in device.model.detail, "it is reported")
        assert device.model
        assert "pip install" in device.model.detail
        assert (device.model.phase, device.model.last_update) == ("fetching", None)
        assert desk.asked[release.artifact.digest] == 0, "the model is not fetched before it could run"
        install_again()
        assert (await device.finished(1)).outcome == "succeeded"
        answer = await device.server.infer(MODEL, None, {"x": ROW})
        assert answer.outputs["y"].tolist() == (ROW + 11).tolist()
        assert device.model.detail == ""


async def test_a_plugin_that_is_gone_after_a_restart_lets_the_previous_release_answer_until_it_is_back(
    tmp_path: Path, site: Path, desk: ReleaseDesk
) -> None:
    step, folder = plugged(tmp_path, site), tmp_path / "device"
    model = adder(tmp_path / "m.onnx", 1).read_bytes()
    async with device_at(folder, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", model)))
        await device.finished(1)
        await device.executor.accept(desk.order(desk.release("2", model, dress=dressed(piped((step,))))))
        assert (await device.finished(2)).outcome == "succeeded"
    install_again = uninstalled(site)
    async with device_at(folder, desk) as device:
        answer = await device.server.infer(MODEL, None, {"x": ROW})
        assert (answer.version, answer.outputs["y"].tolist()) == ("1", (ROW + 1).tolist())
        assert device.model
        assert (device.model.phase, device.model.running) == ("warming", "1")
        assert "plugin_missing" in device.model.detail
        asked = desk.asked.total()
        install_again()
        await eventually(lambda: device.model and device.model.phase == "idle", "it is back")
        answer = await device.server.infer(MODEL, None, {"x": ROW})
        assert (answer.version, answer.outputs["y"].tolist()) == ("2", (ROW + 11).tolist())
        assert desk.asked.total() == asked, "nothing was fetched again"


async def test_samples_go_through_all_of_it(tmp_path: Path, site: Path, desk: ReleaseDesk) -> None:
    step, model = plugged(tmp_path, site), adder(tmp_path / "m.onnx", 1).read_bytes()
    pipeline = piped((step,), (TOP,))
    async with device_at(tmp_path / "device", desk) as device:
        for order, (label, outcome) in enumerate((("class 1", "succeeded"), ("class 2", "failed")), 1):
            expected = {"top_labels": np.array([[label]], object)}
            samples = encode_samples([Sample("one", {"x": ROW}, expected)])
            test = SelfTest(samples=SAMPLES_FILE, count=1, rules={"top_labels": Exact()})
            release = desk.release(
                str(order), model, weights={SAMPLES_FILE: samples}, self_test=test, dress=dressed(pipeline, TOPPED)
            )
            await device.executor.accept(desk.order(release))
            assert (await device.finished(order)).outcome == outcome
        assert (await device.server.infer(MODEL, None, {"x": ROW})).version == "1"


@pytest.mark.parametrize(
    "body", ["raise RuntimeError('no')", "return {}", "return {'x': arrays['x'][:, :2]}", "while True: pass"]
)
async def test_a_step_that_fails_on_made_up_inputs_rejects_the_release(tmp_path: Path, site: Path, body: str) -> None:
    server = server_of(run_s_max=3.0 if "while" in body else 60.0)
    step = plugged(tmp_path, site, body=body)
    with pytest.raises(ModelRejected, match=r"step acme.add 1.0"):
        await serve(server, adder(tmp_path / "m.onnx", 1), piped((step,)))
    await server.close()


async def test_the_release_before_answers_what_a_step_fails_on_and_the_new_one_is_blamed(
    tmp_path: Path, site: Path
) -> None:
    server = server_of()
    bad = "if arrays['x'].any(): {what}\n        return dict(arrays)"
    model = adder(tmp_path / "m.onnx", 1)
    await serve(server, model, None, version="1")
    await server.commit(MODEL)
    step = plugged(tmp_path, site, body=bad.format(what="raise RuntimeError('no')"))
    await serve(server, model, piped((step,)), version="2")
    answer = await server.infer(MODEL, None, {"x": ROW})
    assert (answer.version, server.health(MODEL).errors) == ("1", 1)
    with pytest.raises(EngineFailure, match="raised RuntimeError: no"):
        await server.infer(MODEL, Version("2"), {"x": ROW})
    await server.close()


async def test_a_step_that_loops_on_a_request_is_stopped_and_the_core_is_free_again(tmp_path: Path, site: Path) -> None:
    server = server_of(workers=1, run_s_max=5.0)
    body = "while arrays['x'].any(): pass\n        return dict(arrays)"
    await serve(server, adder(tmp_path / "m.onnx", 1), piped((plugged(tmp_path, site, body=body),)))
    with pytest.raises(EngineFailure, match="took too long and was stopped"):
        await server.infer(MODEL, None, {"x": ROW})
    assert (await server.infer(MODEL, None, {"x": ROW * 0})).version == "1"
    await server.close()


async def test_what_a_step_calls_the_callers_fault_is_not_the_releases(tmp_path: Path, site: Path) -> None:
    server = server_of()
    top = "from common.pipelines import InvalidInput\n"
    body = "if arrays['x'].any(): raise InvalidInput('no such picture')\n        return dict(arrays)"
    await serve(server, adder(tmp_path / "m.onnx", 1), piped((plugged(tmp_path, site, top=top, body=body),)))
    with pytest.raises(InvalidInput, match="no such picture"):
        await server.infer(MODEL, None, {"x": ROW})
    assert server.health(MODEL).requests == 0
    await server.close()


async def test_a_release_whose_steps_do_not_fit_is_rejected(tmp_path: Path) -> None:
    server, model = server_of(), adder(tmp_path / "m.onnx", 1)
    with pytest.raises(ModelRejected, match="steps before the model make"):
        await serve(server, model, piped(before=(TOP,)), Y)
    with pytest.raises(ModelRejected, match="in the manifest and not in the model"):
        await serve(server, model, piped(after=(TOP,)), Y)
    with pytest.raises(ModelRejected, match="the model takes other tensors"):
        await serve(server, model, replace(piped(after=(TOP,)), model_inputs=TOPPED), TOPPED)
    await server.close()


@pytest.mark.parametrize("row_wise", [True, False])
async def test_requests_are_joined_only_if_all_steps_treat_rows_one_by_one(
    tmp_path: Path, site: Path, row_wise: bool
) -> None:
    server = server_of(workers=1)
    step = plugged(tmp_path, site, row_wise=row_wise, body="import time; time.sleep(0.002); return dict(arrays)")
    await serve(server, adder(tmp_path / "m.onnx", 1), piped((step,)))
    await server.commit(MODEL)
    for _ in range(30):
        await asyncio.gather(*(server.infer(MODEL, None, {"x": ROW}) for _ in range(8)))
    rows = {runs.rows for runs in server.served(MODEL).statistics.runs}
    assert (max(rows) > 1) is row_wise
    await server.close()


async def test_a_photo_goes_in_and_a_name_comes_out_over_http(tmp_path: Path) -> None:
    """The example of docs/how-to/pipelines.md, on a model that names colours."""
    image = {"output": "image", "width": 2, "height": 2, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    top = {"k": 1, "softmax": True, "labels": ["red", "green", "blue"]}
    pipeline = Pipeline(
        model_inputs=(TensorSpec("image", "FP32", (1, 3, 2, 2)),),
        model_outputs=(TensorSpec("scores", "FP32", (1, 3)),),
        before=(PipelineStep(plugin="edgeferry.image", version="1", parameters=image),),
        after=(PipelineStep(plugin="edgeferry.top_k", version="1", parameters=top),),
    )
    inputs = (TensorSpec("file", "UINT8", (-1,)),)
    outputs = tuple(replace(spec, shape=(1, 1)) for spec in TOPPED)
    server, model = server_of(), channel_means(tmp_path / "m.onnx")
    server.switch(await server.prepare(MODEL, Version("1"), model, inputs, outputs, extras=Extras(pipeline)))
    listener = await listen(inference_app(server, dict), "127.0.0.1", 0, None)
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (20, 200, 30)).save(file, "JPEG")
    sent: dict[str, Any] = {"inputs": [{"name": "file", "datatype": "UINT8", "shape": [len(file.getvalue())]}]}
    sent["inputs"][0]["data"] = list(file.getvalue())
    async with httpx.AsyncClient(base_url=listener.url, trust_env=False) as client:
        answer = (await client.post(f"/v2/models/{MODEL}/infer", json=sent)).json()
        sent["inputs"][0] |= {"data": [1, 2, 3], "shape": [3]}
        refused = await client.post(f"/v2/models/{MODEL}/infer", json=sent)
    assert [one["data"] for one in answer["outputs"] if one["name"] == "top_labels"] == [["green"]]
    assert (refused.status_code, "cannot be decoded" in refused.json()["error"]) == (400, True)
    await listener.close()
    await server.close()
