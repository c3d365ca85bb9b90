"""The ways to a release of several files, with real files, HTTP and ONNX Runtime: held, chains, parts; and a budget."""

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from common.artifact import digest_of
from common.artifact.protobuf import Span
from common.wire import PartsOffer, ReportedModel
from tests.conftest import eventually
from tests.integration.agent_bench import Device, device_at
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import WEIGHTS_FILE, weighted

TENSOR_BYTES = 64 * 1024
SHIFT_BYTES = 8 * 1024
SMALL = 8000
"""More than manifest, ONNX file and one patch or two indexes; far less than the weights."""


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


class Line:
    """Versions 1, 2, 3... of one model in two files; version n answers x + n, and its weights differ from n - 1's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self, version: int) -> tuple[bytes, bytes]:
        return weighted(self._folder / "made", 0, version)

    def onnx(self, version: int) -> bytes:
        return self.files(version)[0]

    def weights(self, version: int) -> bytes:
        return self.files(version)[1]


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


async def answer(device: Device) -> float:
    answered = await device.server.infer(MODEL, None, {"x": np.zeros((1, 4), np.float32)})
    return float(answered.outputs["y"].flat[0])


async def install(device: Device, desk: ReleaseDesk, line: Line, version: int) -> None:
    model, weights = line.files(version)
    order = desk.order(desk.release(str(version), model, weights={WEIGHTS_FILE: weights}))
    await device.executor.accept(order)
    assert (await device.finished(desk.generation)).outcome == "succeeded"


def parts_of(desk: ReleaseDesk, old: bytes, new: bytes) -> PartsOffer:
    return desk.parts(old, new, [Span(at, min(at + TENSOR_BYTES, len(new))) for at in range(0, len(new), TENSOR_BYTES)])


async def said(device: Device, word: str) -> ReportedModel:
    """What the device reports once `word` is in its detail."""
    await eventually(lambda: device.model and word in device.model.detail, word)
    assert device.model
    return device.model


async def test_a_model_with_its_weights_beside_it_is_served_and_patched_file_by_file(
    tmp_path: Path, desk: ReleaseDesk, line: Line
) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        assert await answer(device) == 1
        assert set(device.executor.standing().held) == {digest_of(data) for data in line.files(1)}

        (model, weights), old = line.files(2), line.weights(1)
        offer = desk.patch(old, weights)
        await device.executor.accept(
            desk.order(desk.release("2", model, weights={WEIGHTS_FILE: weights}, patches=[offer]))
        )
        update = await device.finished(2)
        assert (update.outcome, update.strategy, update.full_bytes) == ("succeeded", "delta", len(model) + len(weights))
        assert update.bytes_transferred < SMALL
        assert await answer(device) == 2
        assert desk.asked[digest_of(model)] == 1, "the ONNX file is the same and was held"
        await eventually(lambda: not list((tmp_path / "downloads").iterdir()), "nothing is left of the downloads")
    async with device_at(tmp_path, desk) as device:
        assert await answer(device) == 2


async def test_a_chain_of_patches_leads_over_a_release_that_the_device_never_had(
    tmp_path: Path, desk: ReleaseDesk, line: Line
) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        model = line.onnx(4)
        files = [line.weights(version) for version in (1, 2, 3, 4)]
        chain = [desk.patch(old, new) for old, new in itertools.pairwise(files)]
        release = desk.release("4", model, weights={WEIGHTS_FILE: files[-1]}, patches=chain)
        await device.executor.accept(desk.order(release))
        update = await device.finished(2)
        assert (update.outcome, update.strategy) == ("succeeded", "delta")
        assert await answer(device) == 4
        assert [desk.asked[offer.patch.digest] for offer in chain] == [1, 1, 1]
        await eventually(lambda: not list((tmp_path / "downloads").iterdir()), "nothing is left of the downloads")


async def test_a_damaged_link_of_a_chain_costs_the_chain_only(tmp_path: Path, desk: ReleaseDesk, line: Line) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        model, files = line.onnx(3), [line.weights(version) for version in (1, 2, 3)]
        chain = [desk.patch(files[0], files[1]), desk.patch(files[1], files[2])]
        lying = desk.patch(files[0], files[2])  # a patch to another file than it says
        chain[0] = replace(lying, target=chain[0].target)
        release = desk.release("3", model, weights={WEIGHTS_FILE: files[2]}, patches=chain)
        await device.executor.accept(desk.order(release))
        update = await device.finished(2)
        assert (update.outcome, update.strategy) == ("succeeded", "full")
        assert "patch not used" in update.detail
        assert await answer(device) == 3
        await eventually(lambda: not list((tmp_path / "downloads").iterdir()), "nothing is left of the downloads")


async def test_only_the_parts_that_changed_are_fetched_and_a_break_does_not_begin_them_anew(
    tmp_path: Path, desk: ReleaseDesk, line: Line
) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        (model, weights), old = line.files(2), line.weights(1)
        offer = parts_of(desk, old, weights)
        assert offer.bytes == SHIFT_BYTES
        whole = digest_of(weights)
        desk.faults[whole] = "break_once"
        release = desk.release("2", model, weights={WEIGHTS_FILE: weights}, parts=[offer])
        await device.executor.accept(desk.order(release))
        update = await device.finished(2)
        assert (update.outcome, update.strategy) == ("succeeded", "incremental")
        assert update.resumed_bytes == SHIFT_BYTES // 2
        assert desk.sent[whole] == SHIFT_BYTES
        assert SHIFT_BYTES < update.bytes_transferred < SHIFT_BYTES + SMALL
        assert await answer(device) == 2
        await eventually(lambda: not list((tmp_path / "downloads").iterdir()), "nothing is left of the downloads")


@pytest.mark.parametrize("wrong", ["bytes", "index", "promise"])
async def test_parts_that_do_not_fit_fall_back_to_the_next_cheapest(
    tmp_path: Path, desk: ReleaseDesk, line: Line, wrong: str
) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        (model, weights), old = line.files(2), line.weights(1)
        offer = parts_of(desk, old, weights)
        if wrong == "index":  # says that the old file is the new one
            offer = replace(offer, base_index=offer.index)
        elif wrong == "promise":
            offer = replace(offer, bytes=offer.bytes - 1)
        else:
            desk.faults[digest_of(weights)] = "tamper_once"
        release = desk.release("2", model, weights={WEIGHTS_FILE: weights}, parts=[offer])
        await device.executor.accept(desk.order(release))
        update = await device.finished(2)
        assert (update.outcome, update.strategy) == ("succeeded", "full")
        assert "parts not used" in update.detail
        assert await answer(device) == 2


async def test_an_update_over_its_budget_waits_for_a_better_offer_and_downloads_nothing(
    tmp_path: Path, desk: ReleaseDesk, line: Line
) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        (model, weights), old = line.files(2), line.weights(1)
        asked = desk.asked.total()
        release = desk.release("2", model, weights={WEIGHTS_FILE: weights}, max_bytes=SMALL)
        await device.executor.accept(desk.order(release))
        entry = await said(device, "waiting for a cheaper way")
        assert f"the budget is {SMALL // 1000} 000" in entry.detail
        assert (entry.phase, entry.running, entry.target) == ("fetching", "1", "2")
        for _ in range(3):
            device.executor.look_again()
            device.executor.nudge()
            await asyncio.sleep(0.05)
        assert desk.asked.total() == asked
        assert await answer(device) == 1
    async with device_at(tmp_path, desk) as device:  # a restart is no reason to break it either
        await said(device, "waiting for a cheaper way")
        assert desk.asked.total() == asked
        cheaper = desk.release(
            "2", model, weights={WEIGHTS_FILE: weights}, max_bytes=SMALL, patches=[desk.patch(old, weights)], order=2
        )
        await device.executor.accept(desk.order(replace(cheaper, manifest=release.manifest)))
        update = await device.finished(2)
        assert (update.outcome, update.strategy) == ("succeeded", "delta")
        assert update.bytes_transferred <= SMALL
        assert await answer(device) == 2


async def test_a_damaged_patch_does_not_break_the_budget(tmp_path: Path, desk: ReleaseDesk, line: Line) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        (model, weights), old = line.files(2), line.weights(1)
        offer = desk.patch(old, weights)
        desk.faults[offer.patch.digest] = "tamper"
        release = desk.release("2", model, weights={WEIGHTS_FILE: weights}, max_bytes=SMALL, patches=[offer])
        await device.executor.accept(desk.order(release))
        await said(device, "waiting for a cheaper way")
        assert desk.asked[digest_of(weights)] == 0


async def test_an_order_may_fail_over_its_budget_and_a_newer_one_is_not_held_to_it(
    tmp_path: Path, desk: ReleaseDesk, line: Line
) -> None:
    async with device_at(tmp_path, desk) as device:
        await install(device, desk, line, 1)
        model, weights = line.files(2)
        release = desk.release("2", model, weights={WEIGHTS_FILE: weights}, max_bytes=SMALL, on_exceed="fail")
        await device.executor.accept(desk.order(release))
        update = await device.finished(2)
        assert (update.outcome, update.reason, update.bytes_transferred) == ("failed", "over_budget", 0)
        assert "the budget is" in update.detail
        assert device.model
        assert (device.model.phase, device.model.running) == ("failed", "1")
        await device.executor.accept(desk.order(replace(release, order=3, max_bytes=None)))
        assert (await device.finished(3)).outcome == "succeeded"
        assert await answer(device) == 2


@pytest.mark.parametrize("fault", ["truncate", "stall"], ids=["told", "untold"])
async def test_bytes_from_before_a_death_count_once_against_the_budget(
    tmp_path: Path, desk: ReleaseDesk, fault: str
) -> None:
    model, weights = weighted(tmp_path / "made", 0, 1, tensors=12)
    release = desk.release("1", model, weights={WEIGHTS_FILE: weights})
    exactly = release.size + release.manifest.size
    whole = digest_of(weights)
    desk.faults[whole] = fault
    device = Device(tmp_path, desk)
    await device.executor.start()
    await device.executor.accept(desk.order(replace(release, max_bytes=exactly)))
    part = device.slots.download_path(whole).with_suffix(".part")
    await eventually(lambda: part.exists() and part.stat().st_size > len(weights) // 4, "some of it is here")
    await device.die()
    kept = part.stat().st_size
    desk.faults.clear()
    async with device_at(tmp_path, desk) as device:
        update = await device.finished(1)
        assert (update.outcome, update.bytes_transferred) == ("succeeded", exactly)
        assert update.resumed_bytes >= kept
        assert await answer(device) == 1


async def test_a_waiting_update_goes_on_when_a_look_finds_it_cheaper(
    tmp_path: Path, desk: ReleaseDesk, line: Line
) -> None:
    model, weights = line.files(1)
    release = desk.release("1", model, weights={WEIGHTS_FILE: weights}, max_bytes=SMALL)
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(release))
        await said(device, "waiting for a cheaper way")
        for digest in (release.manifest.digest, *(file.artifact.digest for file in release.files)):
            device.slots.download_path(digest).write_bytes(desk.blobs[digest])  # somebody came by with a memory stick
        device.executor.look_again()
        assert (await device.finished(1)).outcome == "succeeded"
        assert not desk.asked
        assert await answer(device) == 1


async def test_bytes_that_came_wrong_count_too(tmp_path: Path, desk: ReleaseDesk, line: Line) -> None:
    model, weights = line.files(1)
    release = desk.release("1", model, weights={WEIGHTS_FILE: weights})
    desk.faults[digest_of(weights)] = "tamper"
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(replace(release, max_bytes=release.size + release.manifest.size)))
        await said(device, "waiting for a cheaper way")
        assert desk.asked[digest_of(weights)] == 1


async def test_rubbish_that_a_power_cut_left_does_not_break_the_budget(
    tmp_path: Path, desk: ReleaseDesk, line: Line
) -> None:
    model, weights = line.files(1)
    release = desk.release("1", model, weights={WEIGHTS_FILE: weights})
    budget = release.size + release.manifest.size
    async with device_at(tmp_path, desk) as device:
        part = device.slots.download_path(digest_of(weights)).with_suffix(".part")
        part.write_bytes(bytes(len(weights) // 2))
        await device.executor.accept(desk.order(replace(release, max_bytes=budget)))
        await said(device, "waiting for a cheaper way")
        assert desk.sent.total() <= budget
        await device.executor.accept(desk.order(replace(release, max_bytes=2 * budget)))
        assert (await device.finished(1)).outcome == "succeeded"
        assert desk.sent.total() <= 2 * budget
        assert await answer(device) == 1


@pytest.mark.parametrize("names", [("manifest.json",), (WEIGHTS_FILE, WEIGHTS_FILE.upper())], ids=["ours", "twice"])
async def test_files_that_cannot_lie_in_one_folder_are_rejected(
    tmp_path: Path, desk: ReleaseDesk, line: Line, names: tuple[str, ...]
) -> None:
    model, weights = line.files(1)
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", model, weights=dict.fromkeys(names, weights))))
        update = await device.finished(1)
        assert (update.outcome, update.reason) == ("rejected", "integrity_failure")
        assert "cannot lie in one folder" in update.detail


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
async def test_two_names_for_the_same_bytes_are_fetched_once(
    tmp_path: Path, desk: ReleaseDesk, line: Line, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    model, weights = line.files(1)
    both = {WEIGHTS_FILE: weights, "copy.bin": weights}
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(desk.order(desk.release("1", model, weights=both)))
        assert (await device.finished(1)).outcome == "succeeded"
        assert desk.sent[digest_of(weights)] == len(weights)
        assert await answer(device) == 1
