"""What models do on devices, as the operator sees it: from `publish --reference` and labels to `release stats`."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from common.artifact.tensors import Array
from common.ids import ReleaseRef
from controller.cli import cli
from controller.resources import TelemetryView
from tests.e2e.world import MODEL, World, until

pytestmark = pytest.mark.e2e

CHANCE = np.random.default_rng(7)
OUTPUT = "target_label"
ONE = ReleaseRef.parse(f"{MODEL}@1")


def texts(number: int) -> Array:
    """Random text of ten letters, each as the model takes it."""
    return CHANCE.integers(97, 107, (number, 2048), np.int32)


def ferry(world: World, *words: object) -> Result:
    """The operator's command line."""
    environment = {"FERRY_URL": world.endpoint.url, "FERRY_TOKEN": world.endpoint.token, "HOME": str(world.folder)}
    return CliRunner().invoke(cli, [str(word) for word in words], env=environment)


def measured(
    world: World, true: Callable[[TelemetryView], object], what: str, device: str | None = None
) -> TelemetryView:
    """What the controller says of the release, once that is true."""

    def look() -> TelemetryView | None:
        view = world.client.telemetry(ONE, 3600.0, device)
        return view if true(view) else None

    return until(look, what, world)


def ask(world: World, device: str, inputs: Array, name: str = "") -> list[int]:
    """One request a text; the classes that it was told."""
    with httpx.Client(base_url=f"{world.urls[device]}/v2/models/{MODEL}", timeout=30) as http:
        classes = []
        for number, text in enumerate(inputs):
            tensor = {"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": text.tolist()}
            body = {"inputs": [tensor], **({"id": f"{name}{number}"} if name else {})}
            answer = http.post("/infer", json=body).raise_for_status().json()
            classes.append(int(np.argmax(answer["outputs"][0]["data"])))
    return classes


def publish(world: World, model: Path, *more: object) -> None:
    result = ferry(world, "release", "publish", ONE, model, *more)
    assert result.exit_code == 0, result.output
    world.finish(world.begin(ONE))


def observations(view: TelemetryView) -> int:
    return sum(drift.observations for drift in view.drift)


def test_the_operator_sees_drift_accuracy_waiting_and_what_it_costs(
    world: World, real_models: tuple[Path, Path]
) -> None:
    usual = world.folder / "usual.npz"
    np.savez(usual, bytes=texts(400))
    for device in ("one", "two"):
        world.add_device(device, telemetry_s="0.5", drift_requests_max="256")
    publish(world, real_models[0], "--reference", usual)
    told = ask(world, "one", texts(300), "q-")
    labels = [{"id": f"q-{number}", "label": best if number else best + 1} for number, best in enumerate(told[:20])]
    with httpx.Client(base_url=world.urls["one"]) as http:
        done = http.post(f"/v2/models/{MODEL}/labels", json={"labels": labels}).raise_for_status().json()
        assert done == {"labelled": 20, "correct": 19, "repeated": 0}
    ask(world, "two", CHANCE.integers(0, 60, (120, 2048), np.int32))

    one = measured(world, lambda view: view.accuracy.labelled == 20, "the telemetry of one has come", "one")
    assert (one.devices, one.requests, one.errors, one.refused, one.expired) == (1, 300, 0, 0, 0)
    assert (one.drift_verdict, observations(one) >= 290) == ("stable", True), one.drift
    kinds = {(feature.side, feature.tensor, feature.kind) for feature in one.drift[0].features}
    assert kinds == {("output", OUTPUT, "top1"), ("output", OUTPUT, "values"), ("input", "bytes", "classes")}
    assert one.runs.rows == one.requests
    assert one.queue_p99_s is not None
    assert 0 < one.usage.cpu_s < one.usage.seconds * 4
    assert 10_000_000 < one.usage.pss_bytes_max <= one.usage.rss_bytes_max
    assert (one.accuracy.correct, one.accuracy.share) == (19, 0.95)

    two = measured(world, lambda view: view.requests >= 120, "the telemetry of two has come", "two")
    assert (two.drift_verdict, two.accuracy.share) == ("drifted", None)
    assert {feature.tensor: feature.verdict for feature in two.drift[0].features}["bytes"] == "drifted"

    shown = ferry(world, "-o", "json", "release", "stats", ONE)
    both = json.loads(shown.stdout)
    assert (both["devices"], both["requests"]) == (2, 420)
    assert both["drift"][0]["observations"] == observations(one) + observations(two)
    table = ferry(world, "release", "stats", ONE, "--device", "one").stdout
    for words in ("95.0 % (76.4 % to 99.1 %), 19 of 20 labelled", "stable", "input bytes", "against 400 samples"):
        assert words in table, table


def test_without_a_reference_nothing_is_said_about_drift(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one", telemetry_s="0.5")
    publish(world, real_models[0])
    ask(world, "one", texts(40))
    view = measured(world, lambda view: view.requests >= 40, "the telemetry has come")
    assert (view.drift_verdict, view.drift) == ("inconclusive", ())
