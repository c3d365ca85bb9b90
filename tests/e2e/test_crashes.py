"""SIGKILL anything at any moment of a rollout, start it again: the fleet ends in the same final state.

The moments are states of the rollout as an operator would see them, so that each kill hits the work it is meant to hit:
patches being built, a device in the middle of a download, a device in probation, a phase that bakes, a rollback.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from controller.cli.demo import models
from controller.rollouts.model import ExecutionState, PhaseSpec, PhaseState, RolloutState
from tests.e2e.world import World, until

pytestmark = pytest.mark.e2e

DEVICES = ("one", "two")
DOWNLOAD_BYTES_PER_S = "2000000"
"""So that 3 MB take over a second, and a kill can hit the middle."""
CONTENT = Path(__file__).read_bytes()

Moment = Callable[[World, str], object]


@pytest.fixture
def controller_environment() -> dict[str, str]:
    """One patch to each release, from the release before: those from older ones serve nobody here."""
    return {"FERRY_PATCH_CPU_S_PER_RELEASE": "0.1"}


def created(_world: World, _rollout: str) -> object:
    return True


def downloading(world: World, _rollout: str) -> object:
    partials = [part for name in DEVICES for part in (world.folder / name / "downloads").glob("*.part")]
    return any(part.stat().st_size > 500_000 for part in partials)


def probation(world: World, rollout: str) -> object:
    return world.client.rollout(rollout).counts.get(ExecutionState.PROBATION)


def baking(world: World, rollout: str) -> object:
    return any(phase.state is PhaseState.BAKING for phase in world.client.rollout(rollout).phases)


def rolling_back(world: World, rollout: str) -> object:
    return world.client.rollout(rollout).state in {RolloutState.ROLLING_BACK, RolloutState.ROLLED_BACK}


def kill_controller(world: World) -> None:
    world.controller.kill()
    world.start()


def kill_broker(world: World) -> None:
    world.kill_broker()


def kill_agents(world: World) -> None:
    """The first device of the rollout is in its first phase, and nobody knows which it is: kill both."""
    for name in DEVICES:
        world.agents[name].kill()
    with ThreadPoolExecutor() as both:
        list(both.map(world.start_agent, DEVICES))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kill", [kill_controller, kill_broker, kill_agents], ids=lambda kill: kill.__name__)
def test_rollouts_survive_a_kill_at_any_moment(
    world: World, real_models: tuple[Path, Path], tuned: Path, kill: Callable[[World], None]
) -> None:
    older, newer = real_models
    for name in DEVICES:
        world.add_device(name, download_rate_bytes_per_s=DOWNLOAD_BYTES_PER_S)
    world.roll_out("1", older)
    tuned_again = world.folder / "tuned-again.onnx"
    models.recalibrated(newer, np.linspace(0.1, -0.1, 214, dtype=np.float32), tuned_again)
    for version, file, moment in (
        ("2", newer, downloading),
        ("3", tuned, probation),
        ("4", newer, baking),
        ("5", tuned_again, created),
    ):
        phases = (PhaseSpec(percent=50), PhaseSpec(percent=100))
        rollout = world.begin(world.publish(version, file), *phases, **lasting(moment))
        until(lambda moment=moment, rollout=rollout: moment(world, rollout), moment.__name__, world)  # type: ignore[misc]  # mypy does not infer a lambda's defaults
        kill(world)
        assert world.finish(rollout).counts == {ExecutionState.SUCCEEDED: 2}, moment.__name__
        both_run(world, version)
        if moment is downloading and kill is kill_agents:
            assert max(resumed_bytes(world, name) for name in DEVICES) > 0, "what was fetched before the kill is used"
    world.client.act(rollout, "rollback")
    until(lambda: rolling_back(world, rollout), "rolling back", world)
    kill(world)
    world.finish(rollout, RolloutState.ROLLED_BACK)
    both_run(world, "4")


def lasting(moment: Moment) -> dict[str, float]:
    """How long a rollout waits where: long enough to be met where it is to be killed, hardly at all elsewhere."""
    return {"probation_s": 1.0 if moment is probation else 0.2, "bake_s": 1.0 if moment is baking else 0.2}


def resumed_bytes(world: World, name: str) -> int:
    reported = world.device(name).reported
    update = reported.models[0].last_update if reported else None
    return update.resumed_bytes if update else 0


def both_run(world: World, version: str) -> None:
    for name in DEVICES:
        until(lambda name=name: world.running(name) == version, f"{name} reports {version}", world)  # type: ignore[misc]
        assert world.answer(name, CONTENT).version == version
