"""Optimised models on the disk: they answer as the plain ones do, and trouble with them is nobody's but theirs."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.artifact.tensors import Array
from common.clock import SystemClock
from common.errors import Unavailable
from common.ids import Digest, ModelName, Version
from edge_agent.inference.engine import NOTHING, Beside, EngineFailure, Session
from edge_agent.inference.optimised import DIGESTS_FILE, GRAPH_FILE, OptimisedModels
from edge_agent.inference.ort import OrtEngine, OrtSession
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder
from tests.conftest import MODELS, eventually
from tests.integration.agent_bench import device_at
from tests.integration.release_desk import ReleaseDesk
from tests.integration.small_models import WEIGHTS_FILE, adder, mapped

MODEL = ModelName("magika")
ONE, TWO = Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64)
PAIRS = MODELS.parent / "pairs"
OTHERS = ("nudenet-retrain", "minilm-onnx-10", "ddddocr-int8", "ddddocr-fp32")
"""Real models that are only here where the benchmarks were run."""
PLENTY = 10**12


class Counting(OrtEngine):
    """ONNX Runtime that counts its loads by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.extra = ""

    @property
    def setup(self) -> str:
        return super().setup + self.extra

    def load(self, path: Path, beside: Beside = NOTHING) -> OrtSession:
        self.loads.append("plain")
        return super().load(path, beside)

    def optimise(self, path: Path, target: Path) -> OrtSession:
        self.loads.append("optimise")
        return super().optimise(path, target)

    def load_optimised(self, path: Path) -> OrtSession:
        self.loads.append("optimised")
        return super().load_optimised(path)


class Setting:
    """A cache over one engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Counting()
        self.free = PLENTY
        self.bytes_max = PLENTY

    def cache(self) -> OptimisedModels:
        """As after a restart of the program."""
        self.engine.loads.clear()
        return OptimisedModels(
            self.folder / "optimised",
            self.engine,
            bytes_max=self.bytes_max,
            model_bytes_min=0,
            reserve_bytes=1000,
            free=lambda _: self.free,
        )

    def loads(self, path: Path, identity: Digest = ONE) -> list[str]:
        """The kinds of loads that a load takes after a restart."""
        self.cache().load(MODEL, path, identity).close()
        return list(self.engine.loads)

    @property
    def files(self) -> list[Path]:
        return sorted(file for file in (self.folder / "optimised").rglob("*") if file.is_file())


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@pytest.fixture
def magika(tmp_path: Path, real_models: tuple[Path, Path]) -> Path:
    """A release's folder with nothing but the model."""
    (tmp_path / "slot").mkdir()
    return Path(shutil.copy(real_models[0], tmp_path / "slot" / "model.onnx"))


def random_feeds(session: Session, seed: int) -> dict[str, Array]:
    """Inputs of two rows, and 64 or a picture's 320 on other open axes."""
    chance = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in session.inputs:
        open_axes = (2, *([320] * 3 if len(spec.shape) == 4 else [64] * 3))
        shape = [open_axes[at] if axis < 0 else axis for at, axis in enumerate(spec.shape)]
        dtype = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32}[spec.datatype]
        feeds[spec.name] = chance.integers(0, 2, shape).astype(dtype)
    return feeds


def answers(session: Session, feeds: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    return [session.run(each, [spec.name for spec in session.outputs]) for each in feeds]


@pytest.mark.parametrize("name", ["magika", *OTHERS])
def test_real_models_answer_with_the_same_bits(setting: Setting, real_models: tuple[Path, Path], name: str) -> None:
    path = real_models[0] if name == "magika" else PAIRS / name / "new.onnx"
    if not path.is_file():
        pytest.skip("only where the benchmarks of patches were run")
    plain = OrtEngine().load(path)
    feeds = [random_feeds(plain, seed) for seed in range(2)]
    wanted = answers(plain, feeds)
    for kinds in (["optimise", "optimised"], ["optimised"]):
        session = setting.cache().load(MODEL, path, ONE)
        assert setting.engine.loads == kinds
        assert session.inputs == plain.inputs
        for found, answer in zip(answers(session, feeds), wanted, strict=True):
            for output in answer:
                np.testing.assert_array_equal(found[output], answer[output])
        session.close()
    plain.close()


def test_a_model_with_its_weights_in_another_file_is_kept_whole(setting: Setting, tmp_path: Path) -> None:
    mapped(tmp_path / "slot", 3.0)
    path = tmp_path / "slot" / "model.onnx"
    assert setting.loads(path) == ["optimise", "optimised"]
    (tmp_path / "slot" / WEIGHTS_FILE).unlink()
    session = setting.cache().load(MODEL, path, ONE)
    assert setting.engine.loads == ["optimised"]
    assert session.run({"x": np.ones((1, 4), np.float32)}, ["y"])["y"].tolist() == [[4.0] * 4]
    session.close()


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_one_wrong_bit_is_found_and_the_entry_made_again(
    setting: Setting, magika: Path, number: int, damage: str
) -> None:
    setting.loads(magika)
    good = [file.read_bytes() for file in setting.files]
    assert len(good) == 3
    file = setting.files[number]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(data if damage == "bit" else data[:-1])
    assert setting.loads(magika) == ["optimise", "optimised"]
    assert [file.read_bytes() for file in setting.files] == good
    assert setting.loads(magika) == ["optimised"]


def test_an_entry_in_the_making_is_not_believed(setting: Setting, magika: Path) -> None:
    setting.loads(magika)
    digests = next(file for file in setting.files if file.name == DIGESTS_FILE)
    digests.rename(digests.parent.parent / DIGESTS_FILE)  # as if it had died before the last step
    assert setting.loads(magika) == ["optimise", "optimised"]


def test_another_setup_or_release_has_another_entry(setting: Setting, magika: Path) -> None:
    setting.loads(magika)
    assert setting.loads(magika, TWO) == ["optimise", "optimised"]
    setting.engine.extra = "another processor"
    assert setting.loads(magika) == ["optimise", "optimised"]
    setting.engine.extra = ""
    assert setting.loads(magika) == ["optimise", "optimised"], "the other setup's entry has made way"
    assert len(setting.files) == 6, "one entry for each release"


def test_the_setup_names_runtime_options_and_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setups = [OrtEngine().setup]
    monkeypatch.setattr("edge_agent.inference.ort.THREADS", 2)
    setups.append(OrtEngine().setup)
    monkeypatch.setattr("edge_agent.inference.ort._CONFIG", {"session.intra_op.allow_spinning": "1"})
    setups.append(OrtEngine().setup)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : sse2\n")
    monkeypatch.setattr("edge_agent.inference.ort.CPUINFO", cpuinfo)
    setups.append(OrtEngine().setup)
    monkeypatch.setattr("onnxruntime.__version__", "9.9")
    setups.append(OrtEngine().setup)
    assert len(set(setups)) == len(setups)


def test_without_room_the_load_is_plain_until_there_is_some(setting: Setting, magika: Path) -> None:
    setting.free = magika.stat().st_size
    assert setting.loads(magika) == ["plain"]
    setting.free, setting.bytes_max = PLENTY, magika.stat().st_size - 1
    assert setting.loads(magika) == ["plain"]
    setting.bytes_max = PLENTY
    assert setting.loads(magika) == ["optimise", "optimised"]


def test_a_graph_that_cannot_be_kept_is_loaded_plainly(
    setting: Setting, magika: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: object, path: Path, target: Path) -> OrtSession:
        target.write_bytes(b"half")
        raise EngineFailure("unable to serialise")

    with monkeypatch.context() as patched:
        patched.setattr(Counting, "optimise", refuses)
        cache = setting.cache()
        cache.load(MODEL, magika, ONE).close()
        cache.load(MODEL, magika, ONE).close()
        assert setting.engine.loads == ["plain", "plain"]
        assert setting.files == []
    assert setting.loads(magika) == ["optimise", "optimised"]


def test_a_graph_that_answers_otherwise_is_not_kept(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = adder(tmp_path / "1.onnx", 1), adder(tmp_path / "2.onnx", 2)
    monkeypatch.setattr(Counting, "load_optimised", lambda _, path: OrtEngine().load(other))
    session = setting.cache().load(MODEL, path, ONE)
    assert session.run({"x": np.zeros((1, 4), np.float32)}, ["y"])["y"].tolist() == [[1.0] * 4]
    assert setting.files == []
    session.close()


def test_a_bad_model_is_the_model_s_fault_and_no_memory_is_nobody_s(
    setting: Setting, tmp_path: Path, magika: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(EngineFailure, match="bad"):
        setting.loads(bad)
    setting.loads(magika)

    def no_memory(_: object, path: Path) -> OrtSession:
        raise Unavailable("no memory left")

    monkeypatch.setattr(Counting, "load_optimised", no_memory)
    with pytest.raises(Unavailable):
        setting.loads(magika)
    monkeypatch.undo()
    assert setting.loads(magika) == ["optimised"], "the entry is as good as before"


def test_two_models_of_one_release_are_two_entries(setting: Setting, tmp_path: Path) -> None:
    one, two = adder(tmp_path / "1.onnx", 1), adder(tmp_path / "2.onnx", 2)
    zeros, cache = {"x": np.zeros((1, 4), np.float32)}, setting.cache()
    for path, number in ((one, 1.0), (two, 2.0)):
        session = cache.load(MODEL, path, ONE)
        assert session.run(zeros, ["y"])["y"].tolist() == [[number] * 4]
        session.close()


def test_small_models_are_not_worth_two_files(setting: Setting, tmp_path: Path) -> None:
    path = adder(tmp_path / "adder.onnx", 1)
    engine = setting.engine
    cache = OptimisedModels(
        tmp_path / "o", engine, bytes_max=PLENTY, reserve_bytes=0, free=lambda _: PLENTY, model_bytes_min=100_000
    )
    cache.load(MODEL, path, ONE).close()
    assert engine.loads == ["plain"]


def test_what_no_release_needs_is_removed(setting: Setting, magika: Path) -> None:
    for identity in (ONE, TWO):
        setting.loads(magika, identity)
    cache = setting.cache()
    assert cache.size == sum(file.stat().st_size for file in setting.files)
    cache.tidy(MODEL, [TWO])
    assert setting.loads(magika, TWO) == ["optimised"]
    assert len(setting.files) == 3
    cache.sweep([MODEL])
    assert len(setting.files) == 3
    cache.sweep([])
    assert setting.files == []


def test_a_session_goes_on_when_its_entry_is_removed(setting: Setting, magika: Path) -> None:
    setting.loads(magika)
    session = setting.cache().load(MODEL, magika, ONE)
    feeds = [random_feeds(session, 3)]
    before = answers(session, feeds)
    setting.cache().tidy(MODEL, [])
    np.testing.assert_array_equal(answers(session, feeds)[0]["target_label"], before[0]["target_label"])
    session.close()


async def test_a_server_serves_from_it(setting: Setting, magika: Path) -> None:
    raw = OrtEngine().load(magika)
    cache = setting.cache()
    server = ModelServer(setting.engine, Recorder(0.0), SystemClock())
    candidate = await server.prepare(
        MODEL, Version("1"), magika, raw.inputs, raw.outputs, load=lambda path: cache.load(MODEL, path, ONE)
    )
    assert setting.engine.loads == ["optimise", "optimised"]
    server.switch(candidate)
    feeds = random_feeds(raw, 1)
    answer = await server.infer(MODEL, None, feeds)
    np.testing.assert_array_equal(answer.outputs["target_label"], raw.run(feeds, ["target_label"])["target_label"])
    await server.close()
    raw.close()


def test_the_graph_beside_its_weights_is_what_is_loaded(setting: Setting, magika: Path) -> None:
    setting.loads(magika)
    sizes = {file.name: file.stat().st_size for file in setting.files}
    assert sizes[GRAPH_FILE] < 100_000 < sizes[f"{GRAPH_FILE}.data"]


async def test_a_device_keeps_the_entry_of_what_it_runs_and_gives_it_up_for_an_update(
    setting: Setting, tmp_path: Path, real_models: tuple[Path, Path]
) -> None:
    desk, one = ReleaseDesk(), real_models[0].read_bytes()
    await desk.start()
    free = [PLENTY]

    def room() -> int:
        return free[0] - sum(file.stat().st_size for file in setting.files)

    async with device_at(tmp_path / "device", desk, room, engine=setting.engine, optimised=setting.cache()) as device:
        await device.executor.accept(desk.order(desk.release("1", one)))
        await device.finished(1)
    assert setting.engine.loads == ["optimise", "optimised"]
    async with device_at(tmp_path / "device", desk, room, engine=setting.engine, optimised=setting.cache()) as device:
        assert setting.engine.loads == ["optimised"]
        two = real_models[1].read_bytes()
        free[0] = 16 * 2**20 + 2 * len(two) + 100_000  # for the download and the slot, but not with the entry
        await device.executor.accept(desk.order(desk.release("2", two)))
        assert (await device.finished(2)).outcome == "succeeded"
        assert await device.ask() == ("2", True)
        await eventually(lambda: len(setting.files) <= 3, "only what runs has an entry")
    await desk.stop()
