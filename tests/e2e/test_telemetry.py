"""What models do on devices, as the operator sees it: from `publish --reference` and labels to `release stats`."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from common.artifact.tensors import Array
from common.ids import ReleaseRef
from controller.cli import cli
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


def stats(world: World, version: str, *more: str) -> dict[str, Any]:
    result = ferry(world, "-o", "json", "release", "stats", f"{MODEL}@{version}", *more)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


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


def publish(world: World, version: str, model: Path, *more: object) -> None:
    result = ferry(world, "release", "publish", f"{MODEL}@{version}", model, *more)
    assert result.exit_code == 0, result.output


def test_the_operator_sees_drift_accuracy_waiting_and_what_it_costs(
    world: World, real_models: tuple[Path, Path]
) -> None:
    usual = world.folder / "usual.npz"
    np.savez(usual, bytes=texts(400))
    for device in ("one", "two"):
        world.add_device(device, telemetry_s="0.5", drift_requests_max="256")
    publish(world, "1", real_models[0], "--reference", usual)
    assert world.client.release(ONE).manifest.variants["default"].reference
    world.finish(world.begin(ONE))

    told = ask(world, "one", texts(300), "q-")
    shown = until(lambda: _if(stats(world, "1"), lambda one: _observed(one) >= 290), "the sketches have come", world)
    assert (shown["drift_verdict"], shown["devices"]) == ("stable", 1), shown["drift"]
    kinds = {(one["side"], one["tensor"], one["kind"]) for one in shown["drift"][0]["features"]}
    assert kinds == {("output", OUTPUT, "top1"), ("output", OUTPUT, "values"), ("input", "bytes", "classes")}
    assert shown["runs"]["rows"] >= shown["requests"] >= 300
    assert shown["queue_p99_s"] is not None
    assert (shown["refused"], shown["expired"], shown["accuracy"]["share"]) == (0, 0, None)
    used = shown["usage"]
    assert 0 < used["cpu_s"] < used["seconds"] * 4
    assert 10_000_000 < used["pss_bytes_max"] <= used["rss_bytes_max"]

    labels = [{"id": f"q-{number}", "label": best if number else best + 1} for number, best in enumerate(told[:20])]
    with httpx.Client(base_url=world.urls["one"]) as http:
        done = http.post(f"/v2/models/{MODEL}/labels", json={"labels": labels}).raise_for_status().json()
        assert done == {"labelled": 20, "correct": 19, "repeated": 0}
    shown = until(lambda: _if(stats(world, "1"), lambda one: one["accuracy"]["labelled"]), "the labels came", world)
    accuracy = shown["accuracy"]
    assert (accuracy["correct"], accuracy["labelled"], accuracy["share"]) == (19, 20, 0.95)
    assert accuracy["low"] < 0.95 < accuracy["high"]

    ask(world, "two", CHANCE.integers(0, 60, (120, 2048), np.int32))
    other = until(
        lambda: _if(stats(world, "1", "--device", "two"), lambda one: _observed(one) >= 110), "it came", world
    )
    assert other["drift_verdict"] == "drifted"
    assert {one["tensor"]: one["verdict"] for one in other["drift"][0]["features"]}["bytes"] == "drifted"
    assert stats(world, "1", "--device", "one")["drift_verdict"] == "stable"
    both = stats(world, "1")
    assert (both["devices"], _observed(both)) == (2, _observed(shown) + _observed(other))
    table = ferry(world, "release", "stats", f"{MODEL}@1").stdout
    for words in ("95.0 %", "19 of 20 labelled", "drifted", "input bytes", "requests against 400 samples"):
        assert words in table, table


def test_without_a_reference_nothing_is_said_about_drift(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one", telemetry_s="0.5")
    publish(world, "1", real_models[0])
    world.finish(world.begin(ONE))
    ask(world, "one", texts(40))
    shown = until(lambda: _if(stats(world, "1"), lambda one: one["requests"] >= 40), "telemetry came", world)
    assert (shown["drift_verdict"], shown["drift"]) == ("inconclusive", [])


def _observed(shown: dict[str, Any]) -> int:
    return sum(drift["observations"] for drift in shown["drift"])


def _if(shown: dict[str, Any], true: Any) -> dict[str, Any] | None:
    return shown if true(shown) else None
