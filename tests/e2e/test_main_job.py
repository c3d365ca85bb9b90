"""The main job: publish, roll out, serve; a small change travels small; a bad release is taken back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.http

from common.ids import ReleaseRef
from controller.cli.demo import features, traffic
from controller.cli.demo.corpus import LabelledFile
from controller.rollouts.model import PhaseSpec, RolloutState
from tests.e2e.world import MODEL, World, until

pytestmark = pytest.mark.e2e

CONTENT = Path(__file__).read_bytes()
NO_E = b"0123456789 " * 40
"""Content that the broken model still understands."""


def tokens(content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array([features.tokens(content)], dtype=np.int32)


def test_a_published_model_answers_on_every_device_as_onnxruntime_does(
    world: World, real_models: tuple[Path, Path]
) -> None:
    older, _ = real_models
    for name in ("one", "two"):
        world.add_device(name)
    world.roll_out("1", older)
    expected = onnxruntime.InferenceSession(str(older)).run(None, {"bytes": tokens(CONTENT)})[0]
    for name in ("one", "two"):
        client = tritonclient.http.InferenceServerClient(world.urls[name].removeprefix("http://"))
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        metadata = client.get_model_metadata(MODEL)
        assert [(one["name"], one["datatype"], one["shape"]) for one in metadata["inputs"]] == [
            ("bytes", "INT32", [-1, 2048])
        ]
        given = tritonclient.http.InferInput("bytes", [1, 2048], "INT32")
        given.set_data_from_numpy(tokens(CONTENT))
        answer = client.infer(MODEL, [given])
        client.close()
        np.testing.assert_array_equal(answer.as_numpy("target_label"), expected)
        assert answer.get_response()["model_version"] == "1"


def test_a_small_change_travels_as_a_small_patch_over_mqtt(
    world: World, real_models: tuple[Path, Path], tuned: Path
) -> None:
    world.add_device("one")
    world.roll_out("2", real_models[1])
    world.roll_out("3", tuned)
    reported = world.device("one").reported
    assert reported is not None
    update = reported.models[0].last_update
    assert update is not None
    assert (update.version, update.outcome, update.strategy, update.transport) == ("3", "succeeded", "delta", "mqtt")
    assert 0 < update.bytes_transferred < 0.02 * update.full_bytes
    assert world.answer("one", CONTENT).version == "3"


def test_bytes_that_are_already_there_are_not_sent_again(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one")
    world.roll_out("1", real_models[0])
    world.roll_out("1-renamed", real_models[0])
    reported = world.device("one").reported
    assert reported is not None
    update = reported.models[0].last_update
    assert update is not None
    assert (update.version, update.strategy) == ("1-renamed", "none")
    assert update.bytes_transferred < 10_000, "only the signed manifest"


def test_a_poll_for_an_unchanged_order_is_answered_304(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one", poll_s="0.5")
    world.roll_out("1", real_models[0])

    def unchanged() -> int:
        heartbeat = world.device("one").heartbeat
        return heartbeat.not_modified if heartbeat else 0

    until(unchanged, "the heartbeat counts a 304", world)


def test_what_a_release_did_on_the_devices_can_be_seen(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one", telemetry_s="0.2")
    world.roll_out("1", real_models[0])
    for _ in range(5):
        world.answer("one", CONTENT)
    release = ReleaseRef.parse(f"{MODEL}@1")
    until(lambda: world.client.telemetry(release, 3600).requests == 5, "five requests are counted", world)
    measured = world.client.telemetry(release, 3600)
    assert (measured.devices, measured.errors) == (1, 0)
    assert measured.p50_s


def test_a_broken_release_is_stopped_in_its_first_phase_and_nobody_notices(
    world: World, real_models: tuple[Path, Path], broken: Path
) -> None:
    names = [f"device-{number}" for number in range(3)]
    for name in names:
        world.add_device(name)
    world.roll_out("1", real_models[1])
    applications = [traffic.Application(name, world.urls[name], files_with(CONTENT)) for name in names]
    for application in applications:
        application.start()
    try:
        bad = world.begin(world.publish("2", broken), PhaseSpec(count=1), PhaseSpec(percent=100), probation_s=5)
        rollout = world.finish(bad, RolloutState.ROLLED_BACK)
        told = [one for one in world.client.executions(bad) if one.notified_at is not None]
    finally:
        for application in applications:
            application.stop()
    assert [one.phase for one in told] == [0], "only the first phase was told"
    assert "device-" in rollout.reason, rollout.reason
    assert all(world.running(name) == "1" for name in names)
    assert [sample for application in applications for sample in application.failures()] == []
    assert {world.answer(name, CONTENT).version for name in names} == {"1"}


def files_with(content: bytes) -> list[LabelledFile]:
    return [LabelledFile(Path("content"), "python", content)]


def test_the_operator_sees_and_does_it_from_the_command_line(world: World, real_models: tuple[Path, Path]) -> None:
    world.add_device("one")

    def ferry(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"FERRY_URL": world.endpoint.url, "FERRY_TOKEN": world.endpoint.token, "HOME": str(world.folder)}
        command = [str(Path(sys.executable).parent / "ferry"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)

    assert ferry("release", "publish", f"{MODEL}@1", str(real_models[0])).returncode == 0
    planned = ferry("rollout", "plan", f"{MODEL}@1", "--phases", "100%")
    assert planned.returncode == 0, planned.stderr
    quickly = ("--phases", "100%", "--probation", "0.5", "--bake", "0", "-o", "name")
    created = ferry("rollout", "create", f"{MODEL}@1", *quickly)
    assert created.returncode == 0, created.stderr
    watched = ferry("rollout", "watch", created.stdout.strip().rpartition("/")[2])
    assert watched.returncode == 0, watched.stderr
    listed = ferry("device", "list")
    assert "one" in listed.stdout
    assert ferry("release", "show", f"{MODEL}@9").returncode == 3
