"""What the controller is told about a model."""

from msgspec import UNSET

from common.ids import Digest
from common.wire import ReportedModel, UpdatePhase
from common.wire.messages import TEXT_CHARS_MAX
from edge_agent.update.choice import possible_downloads
from edge_agent.update.state import Installed, ModelState, Stage

PHASES: dict[Stage, UpdatePhase] = {
    Stage.IDLE: "idle",
    Stage.FETCHING: "fetching",
    Stage.VERIFYING: "verifying",
    Stage.WARMING: "warming",
    Stage.SHADOWING: "shadowing",
    Stage.REPLACING: "replacing",
    Stage.SWITCHING: "warming",
    Stage.PROBATION: "probation",
    Stage.FAILED: "failed",
    Stage.RETIRED: "idle",
}
"""The wire's word for each stage. The switch itself is over before anybody could be told."""


def serving(state: ModelState) -> Installed | None:
    """The release that answers requests in this state."""
    if state.stage is Stage.REPLACING:
        return None
    return state.candidate if state.stage is Stage.PROBATION else state.installed


def reported_model(state: ModelState) -> ReportedModel:
    """The wire form of `state`."""
    running = serving(state)
    settled = state.stage in {Stage.IDLE, Stage.RETIRED}
    return ReportedModel(
        model=state.model,
        running=running.version if running else None,
        artifact=running.artifact.digest if running else None,
        phase=PHASES[state.stage],
        target=None if settled or state.target is None else state.target.version,
        generation=state.order,
        activated_at=running.activated_at if running else None,
        detail=state.trouble[:TEXT_CHARS_MAX],
        last_update=state.last_update,
        shadow=UNSET if settled or state.stage is Stage.FAILED else state.shadow or UNSET,
    )


def held_digests(state: ModelState) -> tuple[Digest, ...]:
    """Files in this model's slots, the serving release's first."""
    releases = (serving(state), state.installed, state.candidate, state.previous)
    files = (ref.digest for release in releases if release is not None for ref in release.files.values())
    return tuple(dict.fromkeys(files))


def wanted_downloads(state: ModelState) -> frozenset[Digest]:
    """The downloads that the update under way may go on from; all others can be thrown away."""
    if state.target is None or state.stage in {Stage.IDLE, Stage.FAILED, Stage.RETIRED}:
        return frozenset()
    return frozenset(possible_downloads(state.target))
