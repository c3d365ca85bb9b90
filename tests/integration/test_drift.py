"""References from the command line to the device's engine and back into the store: real models, files and requests."""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from common.artifact import digest_of
from common.artifact.tensors import Array
from common.clock import SystemClock
from common.ids import DeviceId, Digest, ModelName, ReleaseRef, Version
from common.monitoring.making import make_reference
from common.monitoring.reference import REFERENCE_FILE, decode_reference, encode_reference
from common.monitoring.sketch import FeatureCounts, Sketch
from common.wire import Telemetry, TelemetryWindow
from controller.cli import cli
from controller.devices import Device
from controller.intake import apply_telemetry
from controller.measurements import drift_in
from controller.store.port import Transaction
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import SAMPLES_MAX, Recorder
from tests.integration.api_peer import ApiPeer, serving, serving_in_thread
from tests.integration.small_models import MODEL, X, Y, adder

Ferry = Callable[..., Result]
CHANCE = np.random.default_rng(5)


def rows(number: int, shift: float = 0.0) -> Array:
    return (CHANCE.standard_normal((number, 4)) + shift).astype(np.float32)


# Publishing


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiPeer]:
    with serving_in_thread(tmp_path_factory.mktemp("api")) as (api, _):
        yield api


@pytest.fixture
def ferry(api: ApiPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ferry:
    """Runs `ferry release` with these words."""
    monkeypatch.setenv("FERRY_CONTEXTS", str(tmp_path / "contexts.json"))
    monkeypatch.setenv("FERRY_URL", api.url)
    monkeypatch.setenv("FERRY_TOKEN", api.token)
    return lambda *words: CliRunner().invoke(cli, ["release", *(str(word) for word in words)])


def stored(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "usual.npz", **arrays)
    return folder / "usual.npz"


def test_a_published_reference_counts_the_given_inputs_and_the_answers_to_them(
    ferry: Ferry, api: ApiPeer, tmp_path: Path
) -> None:
    inputs = rows(200)
    words = (adder(tmp_path / "m.onnx", 100), "--reference", stored(tmp_path, x=inputs), "--samples", "auto")
    result = ferry("publish", "adder@1", *words, "-o", "json")
    assert result.exit_code == 0, result.stderr
    assert "a reference of 200 samples, of x, y" in result.stderr
    variant = json.loads(result.stdout)["manifest"]["variants"]["default"]
    assert variant["reference"] == REFERENCE_FILE
    path = api.blobs.path(Digest(variant["files"][REFERENCE_FILE]["digest"]))
    assert path
    reference = decode_reference(path.read_bytes())
    assert reference == make_reference(X, Y, [({"x": row[None]}, {"y": row[None] + 100}) for row in inputs])
    assert ferry("publish", "adder@1", *words).exit_code == 0, "the same again is no conflict"
    other = ferry("publish", "adder@1", words[0])
    assert (other.exit_code, "exists with other files" in other.stderr) == (4, True), other.stderr


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": rows(5)}, "5 samples say too little"),
        ({"z": rows(50)}, "the model has no 'z'"),
        ({"x": rows(10_001)}, "at most 10000"),
        ({"x": rows(50).astype(np.int64)}, "int64 for FP32"),
    ],
)
def test_inputs_of_which_no_reference_can_be_made_are_refused(
    ferry: Ferry, tmp_path: Path, arrays: dict[str, Array], words: str
) -> None:
    refused = ferry("publish", "bad@1", adder(tmp_path / "m.onnx", 1), "--reference", stored(tmp_path, **arrays))
    assert (refused.exit_code, words in refused.stderr) == (2, True), refused.stderr
    assert ferry("show", "bad@1").exit_code == 3


OTHER_TENSOR = make_reference(X, (), [({"x": row[None]}, {}) for row in rows(40)])
BAD_FILES = {
    "no reference": b"{}",
    "of another model": encode_reference(OTHER_TENSOR).replace(b'"tensor":"x"', b'"tensor":"other"'),
    "too large": b" " * 200_000,
}


@pytest.mark.parametrize("name", BAD_FILES)
async def test_a_reference_that_does_not_fit_the_model_is_never_signed(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path) as peer:
        model = await peer.upload(adder(tmp_path / "m.onnx", 1).read_bytes())
        usual = await peer.upload(BAD_FILES[name])
        body = {
            "model": "m", "version": "1", "variants": {"default": {"m.onnx": model}}, "references": {"default": usual},
        }  # fmt: skip
        answer = await peer.ask("POST", "/v1/releases", json=body)
        assert answer.status in {400, 413}
        assert answer.problem()["field"] == "references.default"
        assert (await peer.ask("GET", "/v1/releases/m/1")).status == 404


# Sampling on the device


class Watched:
    """A server of `adder` with a reference of standard normal rows."""

    def __init__(self, folder: Path, interval_s: float = 0.0) -> None:
        self.file = folder / REFERENCE_FILE
        usual = [({"x": row[None]}, {"y": row[None] + 10}) for row in rows(500)]
        self.reference = make_reference(X, Y, usual)
        self.file.write_bytes(encode_reference(self.reference))
        self.recorder = Recorder(0.0)
        self.server = ModelServer(OrtEngine(), self.recorder, SystemClock(), sample_interval_s=interval_s)
        self.model = adder(folder / "m.onnx", 10)

    async def serve(self) -> None:
        loaded = await self.server.prepare(MODEL, Version("1"), self.model, X, Y, reference=self.file)
        self.server.switch(loaded)
        await self.server.commit(MODEL)

    async def ask(self, inputs: Array, outputs: list[str] | None = None) -> None:
        for row in inputs:
            await self.server.infer(MODEL, None, {"x": row[None]}, outputs)

    def sketch(self) -> Sketch | None:
        (window,) = self.recorder.cut(1.0)
        return window.sketch


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    made = Watched(tmp_path)
    await made.serve()
    yield made
    await made.server.close()


async def test_a_window_counts_the_inputs_and_the_answers_of_sampled_requests(watched: Watched) -> None:
    inputs = rows(50)
    await watched.ask(inputs)
    sketch = watched.sketch()
    assert sketch
    assert (sketch.reference, sketch.observations) == (digest_of(watched.file.read_bytes()), 50)
    for feature, counts in zip(watched.reference.features, sketch.features, strict=True):
        values = inputs if feature.side == "input" else inputs + np.float32(10)
        if counts.low is not None:
            assert sum(counts.counts) == values.size
            assert (counts.low, counts.high) == (values.min(), values.max())


async def test_samples_are_bounded_in_time_and_in_number(tmp_path: Path) -> None:
    rare = Watched(tmp_path, interval_s=3600.0)
    await rare.serve()
    await rare.ask(rows(20))
    sketch = rare.sketch()
    assert sketch and sketch.observations == 1
    await rare.server.close()
    often = Watched(tmp_path)
    await often.serve()
    await often.ask(rows(SAMPLES_MAX + 20))
    sketch = often.sketch()
    assert sketch and sketch.observations == SAMPLES_MAX
    await often.server.close()


async def test_nothing_is_sampled_without_a_reference_or_where_it_is_switched_off(tmp_path: Path) -> None:
    off = Watched(tmp_path, interval_s=float("inf"))
    await off.serve()
    await off.ask(rows(5))
    assert off.sketch() is None
    await off.server.close()


async def test_a_reference_that_cannot_be_read_is_no_reason_not_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (b"{}", BAD_FILES["of another model"], None):
        caplog.clear()
        broken = Watched(tmp_path)
        broken.file.unlink()
        if data is not None:
            broken.file.write_bytes(data)
        await broken.serve()
        await broken.ask(rows(5))
        assert broken.sketch() is None
        assert "no drift is looked for" in caplog.text
        await broken.server.close()


async def test_what_a_caller_writes_into_its_array_afterwards_is_not_counted(watched: Watched) -> None:
    array = np.zeros((1, 4), np.float32)
    watched.server.infer_here(MODEL, None, {"x": array})
    array[:] = 99.0
    sketch = watched.sketch()
    assert sketch
    assert max(one.high or 0.0 for one in sketch.features) == 10.0


# Coming in


def telemetry(sketch: Sketch, started_at: float) -> Telemetry:
    window = TelemetryWindow(
        model=ModelName("m"),
        version=Version("1"),
        started_at=started_at,
        ended_at=started_at + 1,
        requests=1,
        errors=0,
        latency_counts=(0,) * 17,
        latency_sum_s=0.0,
        sketch=sketch,
    )
    return Telemetry(device=DeviceId("one"), epoch=1, seq=1, sent_at=1.0, windows=(window,))


async def test_only_sketches_by_a_reference_of_the_release_are_kept_and_judged(tmp_path: Path) -> None:
    async with serving(tmp_path) as peer:
        model = await peer.upload(adder(tmp_path / "m.onnx", 1).read_bytes())
        usual = await peer.upload(encode_reference(OTHER_TENSOR))
        body = {
            "model": "m", "version": "1", "variants": {"default": {"m.onnx": model}}, "references": {"default": usual},
        }  # fmt: skip
        assert (await peer.ask("POST", "/v1/releases", json=body)).status == 201
        cells = tuple(feature.cells for feature in OTHER_TENSOR.features)
        good = Sketch(reference=Digest(usual), observations=40, features=(FeatureCounts((1,) * cells[0]),))
        unknown = Sketch(reference=Digest("sha256:" + "e" * 64), observations=40, features=good.features)
        short = Sketch(reference=Digest(usual), observations=40, features=(FeatureCounts((1, 2)),))

        def work(tx: Transaction) -> None:
            tx.devices.put(Device(id=DeviceId("one"), created_at=1.0))
            for place, sketch in enumerate((good, unknown, short)):
                apply_telemetry(tx, DeviceId("one"), telemetry(sketch, float(place)), time.time())

        await peer.store.write(work)
        ref = ReleaseRef.parse("m@1")

        def judge(tx: Transaction) -> tuple[int, tuple[int, ...]]:
            release = tx.releases.get(ref)
            assert release
            return tx.telemetry.totals(ref, 0.0).requests, tuple(one.observations for one in drift_in(tx, release, 0.0))

        assert await peer.store.read(judge) == (3, (40,))
