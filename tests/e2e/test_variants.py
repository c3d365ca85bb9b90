"""A fleet that leaves its variants to measurement: two builds with the same answers, one of them with wasted work."""

import json
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from common.ids import ReleaseRef
from controller.cli import cli
from tests.e2e.world import MODEL, World
from tests.integration.small_models import adder, slow_adder

pytestmark = pytest.mark.e2e

DEVICES = ("a", "b", "c")


def ferry(world: World, *words: object) -> Result:
    """The operator's command line."""
    environment = {"FERRY_URL": world.endpoint.url, "FERRY_TOKEN": world.endpoint.token, "HOME": str(world.folder)}
    return CliRunner().invoke(cli, [str(word) for word in words], env=environment)


def publish(world: World, folder: Path) -> ReleaseRef:
    """`default` wastes time; `lean` does not. Both add 7."""
    slow, lean = slow_adder(folder / "slow.onnx", 7), adder(folder / "lean.onnx", 7)
    result = ferry(world, "release", "publish", f"{MODEL}@1", slow, "--variant", f"lean={lean}")
    assert result.exit_code == 0, result.output
    return ReleaseRef.parse(f"{MODEL}@1")


def variants(world: World) -> list[str]:
    """The variants that the devices were given, by their records."""
    return [chosen.variant for name in DEVICES for chosen in world.device(name).chosen.values()]


def answer(world: World, name: str) -> list[float]:
    x = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]}
    url = f"{world.urls[name]}/v2/models/{MODEL}/infer"
    return list(httpx.post(url, json={"inputs": [x]}, timeout=30).json()["outputs"][0]["data"])


def test_a_class_settles_on_the_faster_of_two_variants_and_the_operator_sees_why(world: World, tmp_path: Path) -> None:
    for name in DEVICES:
        world.add_device(name, variants="auto", defer_s_max="0")  # however busy this machine is
    release = publish(world, tmp_path)

    first = world.finish(world.begin(release)).id

    assert variants(world) == ["default", "lean", "default"]
    assert all(answer(world, name) == [8.0, 9.0, 10.0, 11.0] for name in DEVICES)
    told = [one.chosen.because for one in world.client.executions(first) if one.chosen]
    assert told[1] == "to be measured: 0 of 2 devices of this class have tried lean"

    second = world.finish(world.begin(release)).id

    assert variants(world) == ["lean", "lean", "lean"]
    assert all(answer(world, name) == [8.0, 9.0, 10.0, 11.0] for name in DEVICES)
    times = {one.variant: one for one in world.client.telemetry(release, 3600).variants}
    assert (times["default"].devices, times["lean"].devices) == (2, 3)
    assert (times["lean"].run_s or 1.0) < 0.9 * (times["default"].run_s or 0.0)

    why = "fastest of 2 on this class: lean "
    assert why in ferry(world, "device", "show", "b").output
    shown = json.loads(ferry(world, "device", "show", "b", "-o", "json").output)
    assert shown["chosen"][MODEL]["because"].startswith(why)
    assert shown["chosen"][MODEL]["device_class"] == shown["capabilities"]["device_class"]
    assert why in ferry(world, "rollout", "show", second, "--devices").output
    assert "VARIANT" in ferry(world, "release", "stats", release).output
