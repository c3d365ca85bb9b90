"""What must never happen in a rollout, checked on every plan before it is committed.

Each check raises `Violation`. The mutants in `test_rollout_simulation` show that each one is able to.
"""

from collections import Counter

from common.ids import DeviceId
from controller.rollouts.judgement import IN_FLIGHT
from controller.rollouts.model import Execution, ExecutionState, PhaseState, Rollout, RolloutState
from controller.rollouts.planner import Action, Notify, UpdateExecution, UpdateRollout
from tests.simulation.world import World


class Violation(AssertionError):
    """An invariant does not hold."""


class Invariants:
    """Watches a world. `bad` is whether the release under test fails wherever it is run."""

    def __init__(self, *, bad: bool = False) -> None:
        self.bad = bad
        self._at_risk: dict[str, set[DeviceId]] = {}

    def __call__(self, world: World, rollout: Rollout, actions: list[Action]) -> None:
        told = [action.execution for action in actions if isinstance(action, Notify)]
        self._nobody_is_told_after_a_stop(rollout, told)
        self._nobody_is_told_ahead_of_the_phase(rollout, told)
        self._a_spent_budget_stops_everything(world, rollout, actions, told)
        self._a_device_is_in_one_active_rollout(world)
        self._no_data_is_never_a_pass(world, rollout, actions)
        if self.bad and any(execution.phase > 0 for execution in told):
            raise Violation("a bad release got beyond its first phase")

    def _nobody_is_told_after_a_stop(self, rollout: Rollout, told: list[Execution]) -> None:
        if told and rollout.state is not RolloutState.RUNNING:
            raise Violation(f"{len(told)} devices were told while the rollout was {rollout.state}")

    def _nobody_is_told_ahead_of_the_phase(self, rollout: Rollout, told: list[Execution]) -> None:
        for execution in told:
            before = rollout.phases[: execution.phase]
            if any(phase.state is not PhaseState.PASSED for phase in before):
                raise Violation(f"{execution.device} of phase {execution.phase} was told too early")

    def _a_spent_budget_stops_everything(
        self, world: World, rollout: Rollout, actions: list[Action], told: list[Execution]
    ) -> None:
        """Failures are at most the budget and what was in flight when it was spent (budget by count, from `spec`)."""
        after = {one.device: one for one in world.executions(rollout.id)}
        after |= {one.execution.device: one.execution for one in actions if isinstance(one, UpdateExecution | Notify)}
        failed = {one.device for one in after.values() if one.state is ExecutionState.FAILED}
        if len(failed) <= rollout.spec.error_budget.count * len(rollout.phases):
            return
        in_flight = {one.device for one in after.values() if one.state in IN_FLIGHT}
        # One that succeeded may still go silent while its phase is watched.
        watched = {one.device for one in after.values() if one.state is ExecutionState.SUCCEEDED}
        at_risk = self._at_risk.setdefault(rollout.id, failed | in_flight | watched)
        if told:
            raise Violation(f"{len(told)} devices were told with {len(failed)} failures")
        if not failed <= at_risk:
            raise Violation(f"{failed - at_risk} failed after the budget was spent, and were not in flight then")

    def _a_device_is_in_one_active_rollout(self, world: World) -> None:
        live = [
            (one.device, rollout.spec.release.model)
            for rollout in world.store.rollouts.active()
            for one in world.executions(rollout.id)
        ]
        doubled = [device for device, number in Counter(live).items() if number > 1]
        if doubled:
            raise Violation(f"{doubled[0]} is in two active rollouts")

    def _no_data_is_never_a_pass(self, world: World, rollout: Rollout, actions: list[Action]) -> None:
        resolved = {
            one.phase
            for one in world.executions(rollout.id)
            if one.state in {ExecutionState.SUCCEEDED, ExecutionState.FAILED}
        }
        members = {one.phase for one in world.executions(rollout.id)}
        for action in actions:
            if not isinstance(action, UpdateRollout):
                continue
            for before, after in zip(rollout.phases, action.rollout.phases, strict=True):
                passes = after.state is PhaseState.PASSED and before.state is not PhaseState.PASSED
                if passes and after.index in members and after.index not in resolved:
                    raise Violation(f"phase {after.index} passed with no device resolved")
