"""What a device goes through from order to running model, with real files, HTTP, ONNX Runtime and patches."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.artifact import digest_of
from common.trust import Signer
from edge_agent.slots import SLOTS
from tests.conftest import eventually
from tests.integration.agent_bench import PLENTY, Device, device_at
from tests.integration.release_desk import DEVICE, MODEL, ONNX_FILE, ReleaseDesk, fails_on, recalibrated


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


async def test_a_first_release_is_fetched_whole_and_a_small_change_as_a_patch(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    old = real_models[0].read_bytes()
    new = recalibrated(real_models[0])
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", old)))
        full = await device.finished(1)
        assert (full.outcome, full.strategy, full.transport) == ("succeeded", "full", "http")
        assert len(old) < full.bytes_transferred < len(old) + 5000
        assert await device.ask() == ("1", True)

        offer = desk.patch(old, new)
        await device.executor.accept(desk.order(desk.release("2", new, patches=(offer,))))
        patch = await device.finished(2)
        assert (patch.outcome, patch.strategy) == ("succeeded", "delta")
        assert patch.bytes_transferred < len(new) // 10
        assert desk.sent[digest_of(new)] == 0
        assert await device.ask() == ("2", True)
        assert set(device.executor.standing().held) == {digest_of(old), digest_of(new)}


async def test_going_back_to_the_previous_release_fetches_nothing(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    async with device_at(tmp_path, desk) as device:
        for order, (version, data) in enumerate((("1", one), ("2", two)), 1):
            await device.executor.accept(desk.order(desk.release(version, data)))
            await device.finished(order)
        asked = desk.asked.total()
        await device.executor.accept(desk.order(desk.release("1", one)))
        update = await device.finished(3)
        assert (update.outcome, update.strategy, update.bytes_transferred) == ("succeeded", "none", 0)
        assert desk.asked.total() == asked
        assert await device.ask() == ("1", True)
        await device.executor.accept(desk.order(desk.release("1", one)))
        assert (await device.finished(4)).strategy == "none"


async def test_a_broken_download_resumes(tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]) -> None:
    data = real_models[0].read_bytes()
    release = desk.release("1", data)
    desk.faults[release.artifact.digest] = "break_once"
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(release))
        update = await device.finished(1)
    assert update.outcome == "succeeded"
    assert update.resumed_bytes > 0
    assert len(data) <= update.bytes_transferred < len(data) + 5000
    assert desk.sent[release.artifact.digest] < len(data) + 300_000


async def test_a_patch_that_does_not_fit_falls_back_to_the_whole_file(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    old, new = real_models[0].read_bytes(), recalibrated(real_models[0])
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", old)))
        await device.finished(1)
        offer = desk.patch(old, new)
        desk.faults[offer.patch.digest] = "tamper"
        await device.executor.accept(desk.order(desk.release("2", new, patches=(offer,))))
        update = await device.finished(2)
        assert (update.outcome, update.strategy) == ("succeeded", "full")
        assert "patch not used" in update.detail
        assert await device.ask() == ("2", True)


@pytest.mark.parametrize("fault", ["tamper"])
async def test_wrong_bytes_fail_the_order_and_the_old_release_stays(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path], fault: str
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", one)))
        await device.finished(1)
        bad = desk.release("2", two)
        desk.faults[bad.artifact.digest] = fault
        await device.executor.accept(desk.order(bad))
        update = await device.finished(2)
        assert (update.outcome, update.reason) == ("failed", "integrity_failure")
        assert desk.asked[bad.artifact.digest] == 2
        assert await device.ask() == ("1", True)
        # The same order in a newer generation does not lift the quarantine, a newer order for the model does.
        desk.faults.clear()
        await device.executor.accept(desk.order(bad))
        assert device.model
        assert device.model.phase == "failed"
        await device.executor.accept(desk.order(desk.release("2", two)))
        assert (await device.finished(4)).outcome == "succeeded"


async def test_a_truncated_transfer_and_a_missing_file_are_waited_for(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    release = desk.release("1", real_models[0].read_bytes())
    desk.faults[release.artifact.digest] = "missing"
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(release))
        await eventually(lambda: device.model and "not_found" in device.model.detail, "the trouble is reported")
        desk.faults[release.artifact.digest] = "truncate"
        await eventually(lambda: device.model and "unavailable" in device.model.detail, "the trouble is reported")
        assert device.model
        assert (device.model.phase, device.model.last_update) == ("fetching", None)
        desk.faults.clear()
        assert (await device.finished(1)).outcome == "succeeded"
        assert device.model.detail == ""


async def test_a_full_disk_is_reported_and_waited_for(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    free = [1_000_000]
    async with device_at(tmp_path, desk, lambda: free[0]) as device:
        await device.executor.accept(desk.order(desk.release("1", real_models[0].read_bytes())))
        await eventually(lambda: device.model and "storage_full" in device.model.detail, "the full disk is reported")
        free[0] = PLENTY
        assert (await device.finished(1)).outcome == "succeeded"


async def test_room_is_made_by_giving_up_the_release_before_the_installed_one(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two, three = *(path.read_bytes() for path in real_models), recalibrated(real_models[0])
    room_for_two = 16 * 2**20 + 2 * len(three) + 100_000

    def free() -> int:
        return room_for_two - sum(file.stat().st_size for file in tmp_path.rglob("*.onnx"))

    async with device_at(tmp_path, desk, free) as device:
        for order, (version, data) in enumerate((("1", one), ("2", two), ("3", three)), 1):
            await device.executor.accept(desk.order(desk.release(version, data)))
            assert (await device.finished(order)).outcome == "succeeded"
        assert await device.ask() == ("3", True)


async def test_a_manifest_that_disagrees_with_the_order_is_rejected(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", one, manifest_of=two)))
        update = await device.finished(1)
        assert update.outcome == "rejected"
        assert "different bytes" in update.detail
        assert desk.sent[digest_of(one)] == 0


async def test_bytes_that_are_no_model_never_serve(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one = real_models[0].read_bytes()
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", one)))
        await device.finished(1)
        broken = bytearray(one)
        broken[len(one) // 2] ^= 0xFF
        overflowing = fails_on(real_models[0], token=0)
        await device.executor.accept(desk.order(desk.release("2", overflowing)))
        update = await device.finished(2)
        assert (update.outcome, update.reason, update.activated_at) == ("failed", "model_rejected", None)
        assert await device.ask() == ("1", True)


async def test_a_release_that_answers_nonsense_is_taken_back_and_no_request_fails(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, broken = real_models[0].read_bytes(), fails_on(real_models[0], token=101)
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", one)))
        await device.finished(1)
        stop, answers = asyncio.Event(), []

        async def keep_asking() -> None:
            while not stop.is_set():
                answers.append(await device.ask(token=101))

        traffic = [asyncio.create_task(keep_asking()) for _ in range(2)]
        await device.executor.accept(desk.order(desk.release("2", broken, probation_s=30.0)))
        update = await device.finished(2)
        await eventually(lambda: len(device.server.models()) == 1 and not device.server.models()[0].probation, "back")
        stop.set()
        await asyncio.gather(*traffic)
        assert (update.outcome, update.reason) == ("rolled_back", "unhealthy")
        assert update.activated_at is not None
        assert len(answers) > 5
        assert set(answers) == {("1", True)}


async def test_the_installed_release_serves_after_a_restart_with_nobody_to_ask(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", real_models[0].read_bytes())))
        await device.finished(1)
    await desk.stop()
    (tmp_path / "downloads" / "0badf00d.part").write_bytes(b"left over")
    async with device_at(tmp_path, desk) as device:
        assert await device.ask() == ("1", True)
        assert not list((tmp_path / "downloads").iterdir())
        assert device.executor.standing().generation == 1


async def test_every_change_of_what_serves_is_in_the_journal_first(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, broken = real_models[0].read_bytes(), fails_on(real_models[0], token=101)
    seen: list[tuple[str, str]] = []
    async with device_at(tmp_path, desk) as device:
        for name in ("switch", "commit", "revert", "retire"):
            act = getattr(device.server, name)

            def spy(*subjects: object, name: str = name, act: Callable[..., object] = act, **terms: object) -> object:
                seen.append((name, device.journal.load()[MODEL].stage.value))
                return act(*subjects, **terms)

            monkeypatch.setattr(device.server, name, spy)
        await device.executor.accept(desk.order(desk.release("1", one)))
        await device.finished(1)
        await device.executor.accept(desk.order(desk.release("2", broken, probation_s=30.0)))
        await eventually(lambda: device.model and device.model.phase == "probation", "probation")
        for _ in range(8):
            await device.ask(token=101)
        await device.finished(2)
        await device.executor.accept(desk.order())
        await eventually(lambda: not device.server.models(), "nothing is served")
    assert seen == [
        ("switch", "switching"),
        ("commit", "idle"),
        ("switch", "switching"),
        ("revert", "failed"),
        ("retire", "retired"),
    ]


async def live_and_die_in_probation(device: Device) -> None:
    await device.executor.start()
    assert (await device.ask())[0] in {"1", "2"}
    await eventually(lambda: device.model and device.model.phase == "probation", "probation again")
    await device.die()


async def test_a_release_that_the_agent_dies_over_twice_is_taken_back(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", one)))
        await device.finished(1)
        await device.executor.accept(desk.order(desk.release("2", two, probation_s=3600.0)))
        await eventually(lambda: device.model and device.model.phase == "probation", "probation")
    # A clean stop is no strike, and two kills are; the old release answers in between.
    for _ in range(2):
        await live_and_die_in_probation(Device(tmp_path, desk))
    async with device_at(tmp_path, desk) as device:
        update = await device.finished(2)
        assert (update.outcome, update.reason) == ("rolled_back", "unclean_restarts")
        assert await device.ask() == ("1", True)
        assert len(device.server.models()) == 1


async def test_an_update_continues_the_trace_of_its_order(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("edge_agent.executor.lane.tracer", provider.get_tracer("test"))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with device_at(tmp_path, desk) as device:
        release = desk.release("1", real_models[0].read_bytes())
        await device.executor.accept(desk.order(release, traceparent=f"00-{trace_id}-b7ad6b7169203331-01"))
        await device.finished(1)
        assert device.executor.standing().traceparent
    spans = exporter.get_finished_spans()
    assert {f"update.{name}" for name in ("fetch", "build", "warm", "switch", "watch")} <= {span.name for span in spans}
    assert {format(span.context.trace_id, "032x") for span in spans if span.context} == {trace_id}


async def test_a_damaged_slot_is_noticed_at_start_and_fetched_again(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    async with device_at(tmp_path, desk) as device:
        for order, (version, data) in enumerate((("1", one), ("2", two)), 1):
            await device.executor.accept(desk.order(desk.release(version, data)))
            await device.finished(order)
        paths = [device.slots.path(MODEL, slot, ONNX_FILE) for slot in SLOTS]
        path = next(path for path in paths if path.read_bytes() == two)
    path.write_bytes(two[:-1] + b"!")
    desk.faults[digest_of(two)] = "missing"
    async with device_at(tmp_path, desk) as device:
        assert await device.ask() == ("1", True)
        desk.faults.clear()
        await eventually(lambda: device.model and device.model.running == "2", "the release is back")
        assert await device.ask() == ("2", True)


async def test_orders_that_must_not_be_followed_are_refused(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    release = desk.release("1", real_models[0].read_bytes())
    async with device_at(tmp_path, desk) as device:
        first = desk.order(release)
        assert await device.executor.accept(first)
        await device.finished(1)
        assert not await device.executor.accept(first)
        assert device.executor.standing().refused == ""
        for envelope, why in (
            (desk.order(generation=1), "not above"),
            (desk.order(release, device=type(DEVICE)("dev-2")), "dev-2"),
            (first.replace(b"desired", b"desirex"), "signed as"),
            (Signer.generate().sign("application/vnd.edgeferry.desired+json", b"{}"), "signature"),
            (b"garbage", "envelope"),
        ):
            assert not await device.executor.accept(envelope)
            assert why in device.executor.standing().refused
        assert await device.ask() == ("1", True)
        assert await device.executor.accept(desk.order(release))
        assert device.executor.standing().refused == ""


async def test_a_model_that_leaves_the_order_is_retired(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", real_models[0].read_bytes())))
        await device.finished(1)
        await device.executor.accept(desk.order())
        await eventually(lambda: not device.server.models(), "nothing is served")
        await eventually(lambda: not list((tmp_path / "models").rglob("*.onnx")), "its files are gone")
        assert device.executor.standing().held == ()


async def test_a_newer_order_takes_over_during_a_download_and_during_probation(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    one, two = (path.read_bytes() for path in real_models)
    three = recalibrated(real_models[0])
    async with device_at(tmp_path, desk) as device:
        stuck = desk.release("1", one)
        desk.faults[stuck.artifact.digest] = "truncate"
        await device.executor.accept(desk.order(stuck))
        await eventually(lambda: device.model and device.model.detail, "the download is stuck")
        await device.executor.accept(desk.order(desk.release("2", two)))
        assert (await device.finished(2)).outcome == "succeeded"
        await device.executor.accept(desk.order(desk.release("3", three, probation_s=3600.0)))
        await eventually(lambda: device.model and device.model.phase == "probation", "probation")
        assert await device.ask() == ("3", True)
        await device.executor.accept(desk.order(desk.release("2", two)))
        update = await device.finished(4)
        assert (update.outcome, update.version, update.strategy) == ("succeeded", "2", "none")
        await eventually(lambda: device.server.models()[0].version == "2", "the proven release is back")
        assert await device.ask() == ("2", True)
