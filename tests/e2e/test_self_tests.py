"""A fleet whose releases prove themselves on each device: from `ferry release publish --samples` to the verdict."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from common.artifact.samples import Sample, encode_samples
from common.artifact.selftest import SAMPLES_FILE, Close
from common.ids import ReleaseRef
from controller.cli import cli
from controller.cli.reference_run import Reference
from controller.client import SelfTestDraft
from controller.rollouts.model import RolloutState
from tests.e2e.world import MODEL, World, until

pytestmark = pytest.mark.e2e

OUTPUT = "target_label"
CONTENT = Path(__file__).read_bytes()
TEXTS = np.random.default_rng(0).integers(32, 127, (2, 2048), np.int32)


def ferry(world: World, *words: object) -> Result:
    """The operator's command line."""
    environment = {"FERRY_URL": world.endpoint.url, "FERRY_TOKEN": world.endpoint.token, "HOME": str(world.folder)}
    return CliRunner().invoke(cli, [str(word) for word in words], env=environment)


def publish_proved(world: World, version: str, model: Path) -> ReleaseRef:
    inputs = world.folder / "samples.npz"
    np.savez(inputs, bytes=TEXTS)
    words = ("--samples", inputs, "--latency-max", "60")
    result = ferry(world, "release", "publish", f"{MODEL}@{version}", model, *words)
    assert result.exit_code == 0, result.output
    return ReleaseRef.parse(f"{MODEL}@{version}")


def passed_tests(world: World, device: str) -> int:
    return world.agents[device].log.read_text().count("self-test passed")


def test_a_release_answers_its_samples_on_the_device_before_the_switch_and_after_a_restart(
    world: World, real_models: tuple[Path, Path]
) -> None:
    world.add_device("one")
    world.finish(world.begin(publish_proved(world, "1", real_models[0])))
    assert world.running("one") == "1"
    assert passed_tests(world, "one") == 1
    (samples,) = (world.folder / "one/models" / MODEL).glob(f"?/{SAMPLES_FILE}")
    assert samples.stat().st_size > TEXTS.nbytes
    world.agents["one"].stop()
    world.start_agent("one")
    assert world.answer("one", CONTENT).version == "1"
    assert passed_tests(world, "one") == 2


def test_a_release_that_answers_otherwise_than_expected_is_stopped_and_the_operator_sees_why(
    world: World, real_models: tuple[Path, Path], tuned: Path
) -> None:
    _, proven = real_models
    world.add_device("one")
    world.finish(world.begin(publish_proved(world, "1", proven)))
    feeds = {f"text-{number}": {"bytes": text[np.newaxis]} for number, text in enumerate(TEXTS)}
    answers = Reference(proven).run(feeds, [OUTPUT]).outputs
    samples = world.folder / "wrong.safetensors"
    samples.write_bytes(encode_samples(Sample(name, feeds[name], outputs) for name, outputs in answers.items()))
    draft = SelfTestDraft(samples, {OUTPUT: Close(rtol=1e-3, atol=1e-4)})
    world.client.publish(MODEL, "2", {"default": tuned}, self_tests={"default": draft})
    rollout = world.begin(ReleaseRef.parse(f"{MODEL}@2"))
    finished = world.finish(rollout, RolloutState.ROLLED_BACK)
    assert "self_test_failed" in finished.reason
    shown = ferry(world, "rollout", "show", rollout).stdout
    for words in ("self_test_failed", "sample 'text-0'", f"output '{OUTPUT}'", "off by"):
        assert words in " ".join(shown.split()), shown
    reported = until(lambda: world.device("one").reported, "the device reports", world)
    assert reported.models[0].last_update is not None
    assert world.running("one") == "1"
    assert world.answer("one", CONTENT).version == "1"
