"""SIGKILL anything at any moment of a rollout, start it again: the fleet ends in the same final state.

The moments are states of the rollout as an operator would see them, so that each kill hits the work it is meant to hit:
patches being built, a device in the middle of a download, a device in probation, a phase that bakes, a rollback.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from controller.resources import RolloutView
from controller.rollouts.model import ExecutionState, PhaseSpec, PhaseState, RolloutState
from tests.e2e.world import MODEL, World, until

pytestmark = pytest.mark.e2e

DEVICES = ("one", "two")
DOWNLOAD_BYTES_PER_S = "2000000"
"""So that 3 MB take over a second, and a kill can hit the middle."""
CONTENT = Path(__file__).read_bytes()

Moment = Callable[[World, str], object]


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


def kill_agent(world: World) -> None:
    """The first device of the rollout is in its first phase, and nobody knows which it is: kill both."""
    for name in DEVICES:
        world.agents[name].kill()
    for name in DEVICES:
        world.start_agent(name)


@pytest.mark.parametrize("moment", [created, downloading, probation, baking], ids=lambda moment: moment.__name__)
@pytest.mark.parametrize("kill", [kill_controller, kill_broker, kill_agent], ids=lambda kill: kill.__name__)
def test_a_rollout_survives_a_kill(
    world: World, real_models: tuple[Path, Path], kill: Callable[[World], None], moment: Moment
) -> None:
    begin_with_both_on_version_1(world, real_models[0])
    release = world.publish("2", real_models[1])
    rollout = world.begin(release, PhaseSpec(percent=50), PhaseSpec(percent=100), probation_s=1.0, bake_s=1.0)
    until(lambda: moment(world, rollout), moment.__name__, world)
    kill(world)
    finished = world.finish(rollout)
    assert finished.counts == {"succeeded": 2}
    both_run(world, "2")


@pytest.mark.parametrize("kill", [kill_controller, kill_broker, kill_agent], ids=lambda kill: kill.__name__)
def test_a_rollback_survives_a_kill(
    world: World, real_models: tuple[Path, Path], tuned: Path, kill: Callable[[World], None]
) -> None:
    begin_with_both_on_version_1(world, real_models[1])
    rollout = world.roll_out("2", tuned)
    both_run(world, "2")
    world.client.act(rollout.id, "rollback")
    until(lambda: rolling_back(world, rollout.id), "rolling back", world)
    kill(world)
    taken_back: RolloutView = world.finish(rollout.id, RolloutState.ROLLED_BACK)
    assert taken_back.release == f"{MODEL}@2"
    both_run(world, "1")


def test_an_agent_killed_in_the_middle_of_a_download_does_not_begin_again(
    world: World, real_models: tuple[Path, Path]
) -> None:
    begin_with_both_on_version_1(world, real_models[0])
    rollout = world.begin(world.publish("2", real_models[1]))
    until(lambda: downloading(world, rollout), "in the middle of a download", world)
    kill_agent(world)
    world.finish(rollout)
    updates = [world.device(name).reported for name in DEVICES]
    resumed = [one.models[0].last_update.resumed_bytes for one in updates if one and one.models[0].last_update]
    assert max(resumed) > 0, "what the killed agent had fetched was used"


def begin_with_both_on_version_1(world: World, file: Path) -> None:
    for name in DEVICES:
        world.add_device(name, download_rate_bytes_per_s=DOWNLOAD_BYTES_PER_S)
    world.roll_out("1", file)


def both_run(world: World, version: str) -> None:
    for name in DEVICES:
        until(lambda name=name: world.running(name) == version, f"{name} reports {version}", world)  # type: ignore[misc]
        assert world.answer(name, CONTENT).version == version
