"""A device tells how long a run of a release took if its order asked for that, with the variant, and else neither."""

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from common.wire import DesiredModel, UpdateReport
from edge_agent.update import Installed, ModelState, Stage, step
from edge_agent.update import events as ev
from edge_agent.update.state import files_of
from tests.property.update_world import target_of


def asked(order: int = 1) -> DesiredModel:
    return replace(target_of(1, order), variant="int8", measure=True)


def warming(target: DesiredModel, stage: Stage = Stage.WARMING) -> ModelState:
    candidate = Installed(
        slot="a",
        version=target.version,
        variant=target.variant,
        files=files_of(target),
        onnx_file="model.onnx",
        manifest=target.manifest,
    )
    return ModelState(model=target.model, stage=stage, order=target.order, target=target, candidate=candidate)


def after(state: ModelState, *events: ev.Event) -> UpdateReport:
    for event in events:
        state, _ = step(state, event)
    assert state.last_update is not None
    return state.last_update


WARMED = ev.Warmed(at=1, run_s=0.004)
GOOD = (ev.Switched(at=2), ev.HealthChecked(at=20, verdict="pass", elapsed_s=99))


@pytest.mark.parametrize("stage", [Stage.WARMING, Stage.REPLACING])
def test_the_report_of_an_update_has_the_variant_and_its_time(stage: Stage) -> None:
    report = after(warming(asked(), stage), WARMED, *GOOD)
    assert (report.outcome, report.variant, report.run_s) == ("succeeded", "int8", 0.004)


def test_without_being_asked_nothing_is_told() -> None:
    report = after(warming(target_of(1, 1)), WARMED, *GOOD)
    assert (report.variant, report.run_s) == (UNSET, UNSET)


def test_a_release_that_fails_is_told_with_its_variant() -> None:
    report = after(warming(asked()), ev.ModelRefused(at=1, code="self_test_failed", detail=""))
    assert (report.outcome, report.variant, report.run_s) == ("failed", "int8", UNSET)


def test_what_is_here_already_was_not_measured() -> None:
    done, _ = step(warming(asked()), WARMED)
    for event in GOOD:
        done, _ = step(done, event)
    again = after(done, ev.Ordered(at=30, target=asked(order=2)))
    assert (again.outcome, again.generation, again.variant, again.run_s) == ("succeeded", 2, "int8", UNSET)
