"""Broken bytes, a missing controller: what worked keeps working, and the reason is told."""

from pathlib import Path

import pytest

from common.artifact import digest_of, hex_of
from common.errors import Conflict, InvalidInput
from common.ids import Digest
from controller.rollouts.model import RolloutState
from tests.e2e.world import World, until

pytestmark = pytest.mark.e2e

CONTENT = Path(__file__).read_bytes()


def blob_file(world: World, digest: Digest) -> Path:
    (file,) = (world.folder / "controller/blobs").rglob(f"*{hex_of(digest)}*")
    return file


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_blob_never_runs_and_the_fleet_learns_why(
    world: World, real_models: tuple[Path, Path], damage: str
) -> None:
    older, newer = real_models
    world.add_device("one")
    world.roll_out("1", older)
    release = world.publish("2", newer)
    file = blob_file(world, digest_of(newer.read_bytes()))
    file.chmod(0o600)
    with file.open("r+b") as blob:
        if damage == "flipped":
            blob.seek(1_000_000)
            blob.write(b"\xff" * 64)
        else:
            blob.truncate(1_000_000)
    rollout = world.begin(release)
    until(
        lambda: world.client.rollout(rollout).state is not RolloutState.RUNNING or said(world, "2"),
        "the device or the rollout says what is wrong",
        world,
    )
    assert world.answer("one", CONTENT).version == "1", "the damaged release was never used"


def said(world: World, target: str) -> str:
    reported = world.device("one").reported
    models = reported.models if reported else ()
    return next((entry.detail for entry in models if entry.target == target), "")


def test_a_device_keeps_answering_without_a_controller_and_reports_when_it_is_back(
    world: World, real_models: tuple[Path, Path], tuned: Path
) -> None:
    world.add_device("one")
    world.roll_out("1", real_models[1])
    world.controller.kill()
    assert world.answer("one", CONTENT).version == "1"
    world.agents["one"].kill()
    world.start_agent("one")
    assert world.answer("one", CONTENT).version == "1", "a restart needs nobody either"
    world.start()
    until(lambda: world.device("one").presence == "online", "the device is online again", world)
    world.roll_out("2", tuned)


def test_a_release_is_immutable_and_a_file_that_is_no_model_is_refused(
    world: World, real_models: tuple[Path, Path], tmp_path: Path
) -> None:
    world.publish("1", real_models[0])
    world.publish("1", real_models[0])
    with pytest.raises(Conflict):
        world.publish("1", real_models[1])
    text = tmp_path / "model.onnx"
    text.write_text("this is no model")
    with pytest.raises(InvalidInput) as refusal:
        world.publish("2", text)
    assert "ONNX" in str(refusal.value)
