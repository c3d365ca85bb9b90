"""A fleet that compares a release on live requests and then shares them, from the command line to the device."""

import json
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from controller.cli import cli
from controller.cli.demo import traffic
from controller.cli.demo.corpus import LabelledFile
from tests.e2e.world import MODEL, World, until

pytestmark = pytest.mark.e2e

CONTENT = Path(__file__).read_bytes()
QUICKLY = ("--bake", "0", "-o", "name")
SHADOW = "6s"


def ferry(world: World, *words: object) -> Result:
    """The operator's command line."""
    environment = {"FERRY_URL": world.endpoint.url, "FERRY_TOKEN": world.endpoint.token, "HOME": str(world.folder)}
    return CliRunner().invoke(cli, [str(word) for word in words], env=environment)


def created(world: World, *words: object) -> str:
    result = ferry(world, "rollout", "create", *words, *QUICKLY)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def answering(world: World, side: str) -> str:
    """The version that answers a request which says who shall."""
    payload, length = traffic.request_body(CONTENT)
    headers = {traffic.HEADER_LENGTH: str(length), "X-Model-Side": side}
    url = f"{world.urls['one']}/v2/models/{MODEL}/infer"
    reply = httpx.post(url, content=payload, headers=headers, timeout=30)
    return str(json.JSONDecoder().raw_decode(reply.text)[0]["model_version"])


@pytest.fixture
def application(world: World, real_models: tuple[Path, Path]) -> traffic.Application:
    """A device that runs version 1, and an application that asks it all the time."""
    world.add_device("one")
    world.roll_out("1", real_models[1])
    return traffic.Application("one", world.urls["one"], [LabelledFile(Path("content"), "python", CONTENT)])


def test_a_release_is_compared_then_shares_the_requests_then_answers_all(
    world: World, application: traffic.Application, tuned: Path
) -> None:
    world.publish("2", tuned)
    application.start()
    try:
        shadow = ("--shadow", SHADOW, "--shadow-agree", "top1", "--shadow-agreement", "90%", "--shadow-samples", 2)
        split = ("--split", "50%", "--split-header", "X-Model-Side", "--probation", "4s")
        rollout = created(world, f"{MODEL}@2", *shadow, *split)
        until(lambda: phase(world) == "shadowing", "it is compared", world)
        assert answering(world, "candidate") == "1", "nobody can ask it yet"
        until(lambda: phase(world) == "probation", "it is on trial", world)
        assert {answering(world, "candidate") for _ in range(5)} == {"2"}
        assert {answering(world, "stable") for _ in range(5)} == {"1"}
        with httpx.Client() as http:
            sides = http.get(f"{world.urls['one']}/status").json()["traffic"][MODEL]
        assert sides["candidate"]["requests"] >= 5
        assert sides["stable"]["requests"] >= 5
        watched = ferry(world, "rollout", "watch", rollout)
        assert watched.exit_code == 0, watched.output
    finally:
        application.stop()
    assert application.failures() == []
    assert {sample.version for sample in application.samples} == {"1", "2"}
    assert answering(world, "stable") == "2"
    shown = ferry(world, "device", "show", "one").stdout
    assert "2: shadow pass: 100.0 % agree" in shown
    assert "2: split: new: " in shown
    assert f"{SHADOW.removesuffix('s')} s, 100.0% of the requests" in ferry(world, "rollout", "show", rollout).stdout
    assert "shadow pass" in ferry(world, "rollout", "show", rollout, "--devices").stdout


def test_a_release_that_disagrees_is_refused_before_anybody_got_an_answer_from_it(
    world: World, application: traffic.Application, broken: Path
) -> None:
    world.publish("2", broken)
    application.start()
    try:
        shadow = ("--shadow", SHADOW, "--shadow-agreement", "0.5", "--shadow-samples", 2)
        rollout = created(world, f"{MODEL}@2", *shadow)
        watched = ferry(world, "rollout", "watch", rollout)
    finally:
        application.stop()
    assert watched.exit_code == 1, watched.output
    assert application.failures() == []
    assert {sample.version for sample in application.samples} == {"1"}
    shown = ferry(world, "rollout", "show", rollout, "--devices").stdout
    assert "disagreement" in shown
    assert "agrees with the running one on 0 of" in shown
    assert "a share of 0.5 is asked for" in shown


def phase(world: World) -> str:
    """Where the device stands with the model, as it reports."""
    reported = world.device("one").reported
    return next((entry.phase for entry in reported.models if entry.model == MODEL), "") if reported else ""
