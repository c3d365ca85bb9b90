"""Releases that bring native code: refused unless the owner allows it, and loaded from the slot where he does.

The library is a real one, with hundreds of operators (`onnxruntime_extensions`).
"""

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from common.artifact import Variant
from common.artifact.elf import machine_of
from common.errors import Forbidden, InvalidInput
from edge_agent.inference.engine import Beside, EngineFailure
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.ort import OrtEngine
from tests.integration.agent_bench import device_at
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import custom_ops_library, upper_case
from tests.integration.test_live_weights import heads

LIBRARY = custom_ops_library()
LIBRARY_BYTES = LIBRARY.read_bytes()
NAME = "ops.so"
E_MACHINE = 18
"""Where the header says which machine; 183 is AArch64."""


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


def with_library(variant: Variant) -> Variant:
    return replace(variant, custom_ops=(NAME,))


def for_another_machine(library: bytes) -> bytes:
    return library[:E_MACHINE] + (183).to_bytes(2, "little") + library[E_MACHINE + 2 :]


async def test_an_owner_who_allows_it_gets_operators_from_the_release(tmp_path: Path, desk: ReleaseDesk) -> None:
    model = upper_case(tmp_path / "m.onnx").read_bytes()
    folder, engine = tmp_path / "device", OrtEngine(custom_ops=True)
    async with device_at(folder, desk, engine=engine, custom_ops=True) as device:
        release = desk.release("1", model, weights={NAME: LIBRARY_BYTES}, dress=with_library)
        await device.executor.accept(desk.order(release))
        assert (await device.finished(1)).outcome == "succeeded"
        answer = await device.server.infer(MODEL, None, {"x": np.array(["a", "bc"], object)})
        assert answer.outputs["y"].tolist() == ["A", "BC"]
        await device.executor.accept(
            desk.order(desk.release("2", model, weights={NAME: for_another_machine(LIBRARY_BYTES)}, dress=with_library))
        )
        update = await device.finished(2)
        assert (update.outcome, update.reason) == ("failed", "model_rejected")
        assert "ops.so are for aarch64 (64 bits, little endian), this device is" in update.detail
    async with device_at(folder, desk, engine=engine, custom_ops=True) as device:  # and after a restart
        assert (await device.server.infer(MODEL, None, {"x": np.array(["a"], object)})).version == "1"


async def test_other_native_code_is_never_taken_for_the_one_that_runs(tmp_path: Path, desk: ReleaseDesk) -> None:
    model, engine = heads(tmp_path / "m", 1, 2).read_bytes(), OrtEngine(custom_ops=True)
    kept = OptimisedModels(
        tmp_path / "kept", engine, bytes_max=10**9, model_bytes_min=0, reserve_bytes=0, free=lambda _: 10**9
    )
    async with device_at(tmp_path / "device", desk, engine=engine, custom_ops=True, optimised=kept) as device:
        await device.executor.accept(
            desk.order(desk.release("1", model, weights={NAME: LIBRARY_BYTES}, dress=with_library))
        )
        assert (await device.finished(1)).outcome == "succeeded"
        assert kept.size == 0, "what its operators mean is not in the graph"
        other = for_another_machine(LIBRARY_BYTES)
        await device.executor.accept(desk.order(desk.release("2", model, weights={NAME: other}, dress=with_library)))
        assert (await device.finished(2)).reason == "model_rejected"
        plain = desk.order(desk.release("3", model))
        await device.executor.accept(plain)
        assert (await device.finished(3)).outcome == "succeeded"
        assert kept.size


async def test_an_owner_who_does_not_is_not_even_sent_the_files(tmp_path: Path, desk: ReleaseDesk) -> None:
    model = upper_case(tmp_path / "m.onnx").read_bytes()
    async with device_at(tmp_path / "device", desk) as device:
        release = desk.release("1", model, weights={NAME: LIBRARY_BYTES}, dress=with_library)
        await device.executor.accept(desk.order(release))
        update = await device.finished(1)
        assert (update.outcome, update.reason) == ("rejected", "forbidden")
        assert 'custom_ops = "allow"' in update.detail
        assert all(desk.asked[file.artifact.digest] == 0 for file in release.files)
    with pytest.raises(Forbidden):
        OrtEngine().load(tmp_path / "m.onnx", Beside((LIBRARY,)))


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
def test_what_lies_where_another_library_lay_is_loaded_and_not_that_one(tmp_path: Path) -> None:
    model, library = upper_case(tmp_path / "m.onnx"), tmp_path / NAME
    shutil.copyfile(LIBRARY, library)
    engine = OrtEngine(custom_ops=True)
    first = engine.load(model, Beside((library,)))
    library.rename(tmp_path / "old.so")
    (tmp_path / "empty.c").write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-o", str(library), str(tmp_path / "empty.c")], check=True)
    with pytest.raises(EngineFailure, match="RegisterCustomOps"):
        engine.load(model, Beside((library,)))
    assert first.run({"x": np.array(["a"], object)}, ["y"])["y"].tolist() == ["A"]
    first.close()


@pytest.mark.parametrize(
    "header",
    [b"", b"\x7fELF", b"MZ" + bytes(30), LIBRARY_BYTES[:19], b"\x7fELF\x02\x01" + bytes(10) + b"\x02\0\x3e\0"],
)
def test_what_is_no_shared_library_is_named(header: bytes) -> None:
    with pytest.raises(InvalidInput, match="ELF"):
        machine_of(header)
