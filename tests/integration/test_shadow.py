"""A release is compared on live requests before it answers any: real orders, real onnxruntime, nothing in between."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from msgspec import UNSET, UnsetType
from onnx import TensorProto

from common.ids import Version
from common.wire import DesiredModel, Shadow, ShadowReport, UpdateReport
from edge_agent.inference.loaded import Loaded
from edge_agent.inference.mirror import BYTES_MAX, LOOK_S, REQUESTS_MAX
from edge_agent.inference.requests import Inference, Request
from edge_agent.inference.serving import Candidate
from tests.conftest import eventually
from tests.integration.agent_bench import Device, device_at
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import MODEL as BENCH_MODEL
from tests.integration.small_models import (
    Bench,
    HeldEngine,
    X,
    Y,
    adder,
    endless_unless_zero,
    identity,
    nan_unless_zero,
    raises_unless_zero,
    renamed_output,
)

AN_HOUR = Shadow(for_s=3600)
Make = Callable[[Path], Path]


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


@pytest.fixture
async def device(tmp_path: Path, desk: ReleaseDesk) -> AsyncIterator[Device]:
    """A device that runs version 1, which adds 1."""
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(released(desk, tmp_path, "1", lambda path: adder(path, 1))))
        await device.finished(1)
        yield device


def released(
    desk: ReleaseDesk, folder: Path, version: str, make: Make, shadow: Shadow | UnsetType = UNSET
) -> DesiredModel:
    return desk.release(version, make(folder / "made.onnx").read_bytes(), shadow=shadow)


async def ask(device: Device, value: float = 1.0) -> tuple[str, float]:
    """The version that answered, and what was added."""
    answer = await device.server.infer(MODEL, None, {"x": np.full((1, 4), value, np.float32)})
    return answer.version, float(answer.outputs["y"][0, 0] - value)


async def asked_until(device: Device, order: int) -> tuple[UpdateReport, list[tuple[str, float]]]:
    """How the update ended, and all answers to requests that came meanwhile."""
    answers: list[tuple[str, float]] = []

    async def keep_asking() -> None:
        while True:
            answers.append(await ask(device, float(len(answers) % 7 + 1)))
            await asyncio.sleep(0.005)

    asking = asyncio.create_task(keep_asking())
    update = await device.finished(order)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    return update, answers


async def test_a_release_that_agrees_is_installed_and_the_report_says_how_far(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    terms = Shadow(for_s=2.0, agreement_min=0.99, samples_min=2)
    await device.executor.accept(desk.order(released(desk, tmp_path, "2", lambda path: adder(path, 1), terms)))
    update, answers = await asked_until(device, 2)
    assert update.outcome == "succeeded"
    assert update.shadow
    assert (update.shadow.verdict, update.shadow.agreement) == ("pass", 1.0)
    assert update.shadow.samples >= 2
    assert update.shadow.live.requests == update.shadow.candidate.requests == update.shadow.samples
    assert update.shadow.live.latency_s
    assert update.shadow.candidate.latency_s
    assert {number for _, number in answers} == {1.0}
    assert await ask(device) == ("2", 1.0)


async def test_a_release_that_disagrees_is_refused_before_it_answered_anybody(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    terms = Shadow(for_s=2.0, agreement_min=0.9, samples_min=2)
    bad = released(desk, tmp_path, "2", lambda path: adder(path, 2), terms)
    await device.executor.accept(desk.order(bad))
    update, answers = await asked_until(device, 2)
    assert (update.outcome, update.reason, update.activated_at) == ("failed", "disagreement", None)
    assert "a share of 0.9 is asked for" in update.detail
    assert update.shadow
    assert (update.shadow.verdict, update.shadow.agreed) == ("fail", 0)
    assert len(answers) > 5
    assert set(answers) == {("1", 1.0)}
    # In quarantine: the same order of the fleet again tries nothing.
    await device.executor.accept(desk.order(bad))
    assert device.model
    assert (device.model.phase, await ask(device)) == ("failed", ("1", 1.0))


@pytest.mark.parametrize("make", [nan_unless_zero, raises_unless_zero])
async def test_a_candidate_that_fails_on_live_requests_harms_nobody(
    device: Device, desk: ReleaseDesk, tmp_path: Path, make: Make
) -> None:
    terms = Shadow(for_s=2.0, agreement_min=0.5, samples_min=2)
    await device.executor.accept(desk.order(released(desk, tmp_path, "2", make, terms)))
    update, answers = await asked_until(device, 2)
    assert (update.outcome, update.reason) == ("failed", "disagreement")
    assert update.shadow
    assert update.shadow.candidate.errors == update.shadow.samples
    assert update.shadow.live.errors == 0
    assert set(answers) == {("1", 1.0)}


async def test_when_nobody_asks_nothing_is_known_and_the_update_goes_on(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    terms = Shadow(for_s=0.1, agreement_min=1.0)
    await device.executor.accept(desk.order(released(desk, tmp_path, "2", lambda path: adder(path, 2), terms)))
    update = await device.finished(2)
    assert update.outcome == "succeeded"
    assert update.shadow
    assert (update.shadow.verdict, update.shadow.samples, update.shadow.agreement) == ("inconclusive", 0, None)


async def test_when_nobody_asks_an_order_may_want_the_update_to_fail_and_the_release_is_not_blamed(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    terms = Shadow(for_s=0.1, agreement_min=1.0, on_few="fail")
    release = released(desk, tmp_path, "2", lambda path: adder(path, 2), terms)
    await device.executor.accept(desk.order(release))
    update = await device.finished(2)
    assert (update.outcome, update.reason) == ("failed", "shadow_inconclusive")
    assert "0 live requests were compared; a judgement takes 20" in update.detail
    assert await ask(device) == ("1", 1.0)
    assert device.executor._lanes[MODEL].state.quarantine == ()


async def test_the_first_release_has_nothing_to_be_compared_with(tmp_path: Path, desk: ReleaseDesk) -> None:
    async with device_at(tmp_path, desk) as device:
        first = released(desk, tmp_path, "1", lambda path: adder(path, 1), Shadow(for_s=3600, on_few="fail"))
        await device.executor.accept(desk.order(first))
        update = await device.finished(1)
        assert (update.outcome, bool(update.shadow)) == ("succeeded", False)


async def test_releases_with_other_outputs_cannot_be_compared(
    device: Device, desk: ReleaseDesk, tmp_path: Path
) -> None:
    terms = Shadow(for_s=0.5, agreement_min=1.0, samples_min=1)
    await device.executor.accept(desk.order(released(desk, tmp_path, "2", renamed_output, terms)))
    await eventually(lambda: device.model and device.model.phase == "shadowing", "it is compared")
    assert await ask(device) == ("1", 1.0)
    update = await device.finished(2)
    assert update.shadow
    assert (update.shadow.verdict, update.shadow.samples) == ("inconclusive", 0)


async def test_while_it_is_compared_a_new_order_takes_over_and_the_candidate_is_closed(
    tmp_path: Path, desk: ReleaseDesk
) -> None:
    engine = HeldEngine()
    async with device_at(tmp_path, desk, engine=engine) as device:
        await device.executor.accept(desk.order(released(desk, tmp_path, "1", lambda path: adder(path, 1))))
        await device.finished(1)
        shadowed = released(desk, tmp_path, "2", lambda path: adder(path, 2), AN_HOUR)
        await device.executor.accept(desk.order(shadowed))
        await eventually(lambda: device.model and device.model.phase == "shadowing", "it is compared")
        await ask(device)
        # The same release without the trial: loaded again and switched to.
        await device.executor.accept(desk.order(released(desk, tmp_path, "2", lambda path: adder(path, 2))))
        assert (await device.finished(3)).outcome == "succeeded"
        assert await ask(device) == ("2", 2.0)
        assert engine.sessions[1].closed
        assert not engine.used_after_close
        third = released(desk, tmp_path, "3", lambda path: adder(path, 3), AN_HOUR)
        await device.executor.accept(desk.order(third))
        await eventually(lambda: device.model and device.model.phase == "shadowing", "it is compared")
        await device.executor.accept(desk.order(released(desk, tmp_path, "4", lambda path: adder(path, 4))))
        assert (await device.finished(5)).version == "4"
        assert device.server.traffic() == {}


async def test_after_a_crash_the_comparison_begins_anew_and_two_crashes_are_the_end_of_it(
    tmp_path: Path, desk: ReleaseDesk
) -> None:
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(released(desk, tmp_path, "1", lambda path: adder(path, 1))))
        await device.finished(1)
    for _ in range(2):
        crashing = Device(tmp_path, desk)
        await crashing.executor.start()
        assert await ask(crashing) == ("1", 1.0)
        if crashing.executor.standing().generation == 1:
            shadowed = released(desk, tmp_path, "2", lambda path: adder(path, 2), AN_HOUR)
            await crashing.executor.accept(desk.order(shadowed))
        await eventually(lambda one=crashing: one.model and one.model.phase == "shadowing", "it is compared")  # type: ignore[misc]
        await crashing.die()
    async with device_at(tmp_path, desk) as device:
        update = await device.finished(2)
        assert (update.outcome, update.reason) == ("failed", "unclean_restarts")
        assert await ask(device) == ("1", 1.0)


# The mirror itself.


async def prepared(device: Device, folder: Path, make: Make) -> Candidate:
    return await device.server.prepare(MODEL, Version("2"), make(folder / "candidate.onnx"), X, Y)


async def compared(device: Device, count: int) -> None:
    def enough() -> bool:
        (found,) = device.server.traffic().values()
        return isinstance(found, ShadowReport) and found.samples + found.dropped >= count

    await eventually(enough, f"{count} requests are compared")


async def test_a_share_of_the_requests_is_mirrored(device: Device, tmp_path: Path) -> None:
    candidate = await prepared(device, tmp_path, lambda path: adder(path, 1))
    with device.server.mirroring(candidate, Shadow(for_s=1, share=0.2)) as mirror:
        for _ in range(300):
            await ask(device)
        await asyncio.sleep(0.1)
        seen = mirror.report().samples + mirror.report().dropped
    assert 25 < seen < 110
    await device.server.discard(candidate)


async def test_both_sides_are_shown_while_requests_are_mirrored(device: Device, tmp_path: Path) -> None:
    candidate = await prepared(device, tmp_path, lambda path: adder(path, 1))
    with device.server.mirroring(candidate, Shadow(for_s=1)):
        await ask(device)
        await compared(device, 1)
        (shadow,) = device.server.shadows()
        assert (shadow.version, shadow.current, shadow.statistics.answered) == ("2", False, 1)
        assert [one.version for one in device.server.models()] == ["1"], "it cannot be asked"
    assert device.server.shadows() == ()
    await device.server.discard(candidate)


async def test_a_slow_candidate_is_outrun_and_what_finds_no_room_is_dropped_and_counted(
    device: Device, tmp_path: Path
) -> None:
    candidate = await prepared(device, tmp_path, endless_unless_zero)
    with device.server.mirroring(candidate, Shadow(for_s=1)) as mirror:
        answers = [await ask(device) for _ in range(60)]
        assert set(answers) == {("1", 1.0)}
        found = mirror.report()
        # One is in the engine, or none yet; the rest of those that were not dropped waits.
        assert REQUESTS_MAX <= 60 - found.dropped <= REQUESTS_MAX + 1
        assert found.candidate.requests == 0
        thread = mirror._thread.ident
        assert thread
    candidate.loaded.stop(thread)
    assert mirror.report().dropped >= 59
    await device.server.discard(candidate)


async def test_a_run_that_takes_too_long_is_stopped_and_counts_against_the_candidate(
    tmp_path: Path, desk: ReleaseDesk
) -> None:
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(released(desk, tmp_path, "1", lambda path: adder(path, 1))))
        await device.finished(1)
        device.server._run_s_max = 0.05
        candidate = await prepared(device, tmp_path, endless_unless_zero)
        with device.server.mirroring(candidate, Shadow(for_s=1)) as mirror:
            assert await ask(device) == ("1", 1.0)

            def stopped() -> bool:
                mirror.oversee()
                return mirror.report().candidate.errors == 1

            await eventually(stopped, "the run is stopped")
            assert (mirror.report().samples, mirror.report().agreed) == (1, 0)
        await device.server.discard(candidate)


async def test_a_caller_may_change_its_arrays_as_soon_as_it_has_its_answer(device: Device, tmp_path: Path) -> None:
    candidate = await prepared(device, tmp_path, lambda path: adder(path, 1))
    x = np.ones((1, 4), np.float32)
    with device.server.mirroring(candidate, Shadow(for_s=1, agreement_min=1.0)) as mirror:
        for _ in range(REQUESTS_MAX - 1):
            answer = await asyncio.to_thread(device.server.infer_here, MODEL, None, {"x": x})
            answer.outputs["y"][:] = np.nan
            x += 1
        await compared(device, REQUESTS_MAX - 1)
        assert mirror.report().agreed == mirror.report().samples == mirror.report().live.requests
    await device.server.discard(candidate)


async def test_a_request_too_large_for_the_mirror_is_answered_and_dropped(device: Device, tmp_path: Path) -> None:
    candidate = await prepared(device, tmp_path, lambda path: adder(path, 1))
    rows = BYTES_MAX // 16 + 1
    with device.server.mirroring(candidate, Shadow(for_s=1)) as mirror:
        answer = await device.server.infer(MODEL, None, {"x": np.zeros((rows, 4), np.float32)})
        assert len(answer.outputs["y"]) == rows
        assert (mirror.report().dropped, mirror._bytes) == (1, 0)
    await device.server.discard(candidate)


async def test_the_characters_of_texts_count_too(tmp_path: Path, desk: ReleaseDesk) -> None:
    def repeat(path: Path) -> Path:
        return identity(path, TensorProto.STRING, ["n"])

    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(released(desk, tmp_path, "1", repeat)))
        await device.finished(1)
        served = device.server.models()[0]
        path = repeat(tmp_path / "candidate.onnx")
        candidate = await device.server.prepare(MODEL, Version("2"), path, served.inputs, served.outputs)
        text = np.array(["x" * (BYTES_MAX // 2 + 1)], object)
        with device.server.mirroring(candidate, Shadow(for_s=1)) as mirror:
            await device.server.infer(MODEL, None, {"x": text})
            assert mirror.report().dropped == 1, "as question and answer they are more than fits"
        await device.server.discard(candidate)


async def test_mirrored_requests_count_neither_in_health_nor_in_telemetry(device: Device, tmp_path: Path) -> None:
    candidate = await prepared(device, tmp_path, nan_unless_zero)
    with device.server.mirroring(candidate, Shadow(for_s=1)):
        await ask(device)
        await compared(device, 1)
    loaded: Loaded = candidate.loaded
    assert loaded.health().requests == loaded.statistics().answered == loaded.statistics().failed == 0
    await device.server.discard(candidate)


async def test_nothing_is_run_while_no_core_is_free(tmp_path: Path) -> None:
    bench = Bench(tmp_path, workers=2, queue=4)
    await bench.add(1)
    candidate = await bench.server.prepare(BENCH_MODEL, Version("2"), adder(tmp_path / "2.onnx", 1), X, Y)
    with bench.server.mirroring(candidate, Shadow(for_s=1)) as mirror:
        await bench.ask()
        await eventually(lambda: mirror.report().samples == 1, "one is compared while both cores are free")
        bench.engine.open.clear()
        held = [asyncio.create_task(bench.ask()) for _ in range(2)]
        await eventually(lambda: not bench.server._flow.free, "both cores are taken")
        arrived = bench.engine.arrived
        mirror.offer(*answered(bench))
        await asyncio.sleep(10 * LOOK_S)
        assert bench.engine.arrived == arrived, "the candidate was run"
        bench.engine.open.set()
        assert await asyncio.gather(*held) == [(1.0, "1"), (1.0, "1")]
        await eventually(lambda: mirror.report().samples == 4, "all are compared in the end")
    await bench.server.discard(candidate)
    await bench.server.close()


def answered(bench: Bench) -> tuple[Request, Inference]:
    """A request that the bench's release 1 has answered."""
    x = np.ones((1, 4), np.float32)
    chosen = bench.server._placements.pin(BENCH_MODEL, None)
    chosen.unpin()
    return Request(chosen, {"x": x}, ["y"], 0.0, Future()), Inference({"y": x + 1}, Version("1"), BENCH_MODEL)
