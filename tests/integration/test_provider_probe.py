"""A release on several execution providers: tried once, the fastest sound one kept and remembered.

The official wheel for Linux has no second provider that computes anything, so most tests bring one: another model that
answers the same faster, answers otherwise, or fails. The last test runs where a runtime with OpenVINO is installed.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from common.artifact.samples import Sample, encode_samples
from common.artifact.selftest import SAMPLES_FILE, Close, SelfTest
from common.clock import SystemClock
from common.ids import Digest, Version
from edge_agent.inference.engine import Beside, EngineFailure
from edge_agent.inference.opening import Extras
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.ort import OrtEngine, OrtSession
from edge_agent.inference.probing import ProbingEngine
from edge_agent.inference.provider_memory import FILE_NAME, Entry, ProviderMemory
from edge_agent.inference.providers import CPU
from edge_agent.inference.selftest import SamplesFile
from edge_agent.inference.serving import ModelServer
from edge_agent.telemetry.recorder import Recorder
from tests.integration.small_models import MODEL, X, Y, adder, capped_adder, needs_rows, slow_adder
from tests.integration.test_live_weights import heads

OTHER, OPENVINO = "OtherExecutionProvider", "OpenVINOExecutionProvider"
HERE = Beside(identity="these files")


class TwoProviders(OrtEngine):
    """An engine with a second provider, which runs `other` in the place of every model; None: it cannot load any."""

    def __init__(self, other: Path | None) -> None:
        super().__init__()
        self._other = other
        self.loads: list[str] = []

    def providers(self) -> list[str]:
        return [OTHER, CPU]

    def load_on(self, path: Path, beside: Beside, provider: str) -> OrtSession:
        self.loads.append(provider)
        if provider == CPU:
            return super().load_on(path, beside, CPU)
        if self._other is None:
            raise EngineFailure("no such device")
        return super().load_on(self._other, beside, CPU)


def probing(engine: OrtEngine, folder: Path, *allowed: str) -> ProbingEngine:
    return ProbingEngine(engine, allowed or (OTHER, CPU), ProviderMemory(folder / FILE_NAME))


def seen(folder: Path) -> dict[str, str]:
    (entry,) = json.loads((folder / FILE_NAME).read_text()).values()
    found: dict[str, str] = entry["choice"]["seen"]
    return found


def answer(session: OrtSession, rows: int = 1) -> float:
    return float(session.run({"x": np.zeros((rows, 4), np.float32)}, ["y"])["y"][0, 0])


def test_a_model_that_takes_no_made_up_input_stays_on_the_cpu(tmp_path: Path) -> None:
    engine = TwoProviders(adder(tmp_path / "fast.onnx", 1))
    picky = needs_rows(tmp_path / "picky.onnx", 3)
    session = probing(engine, tmp_path).load(picky, HERE)
    assert answer(session, rows=3) == 1
    assert engine.loads == [CPU]
    assert "made-up" in seen(tmp_path)[CPU]
    probing(engine, tmp_path).load(picky, HERE)
    assert engine.loads == [CPU, CPU], "it is not tried again"


def test_the_faster_provider_is_kept_and_a_restart_does_not_try_again(tmp_path: Path) -> None:
    engine = TwoProviders(adder(tmp_path / "fast.onnx", 1))
    slow = slow_adder(tmp_path / "slow.onnx", 1)
    probing(engine, tmp_path).load(slow, HERE)
    assert sorted(engine.loads) == [CPU, OTHER]
    engine.loads.clear()
    session = probing(engine, tmp_path).load(slow, HERE)
    assert (engine.loads, answer(session)) == ([OTHER], 1.0)


@pytest.mark.parametrize(
    "facts", [Beside(identity="other files"), "another version of the runtime", "another list of providers"]
)
def test_anything_that_the_choice_depends_on_is_a_reason_to_try_again(
    tmp_path: Path, facts: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TwoProviders(adder(tmp_path / "fast.onnx", 1))
    model = adder(tmp_path / "m.onnx", 1)
    probing(engine, tmp_path).load(model, HERE)
    if facts == "another version of the runtime":
        monkeypatch.setattr(onnxruntime, "__version__", "9.9")
    if facts == "another list of providers":
        monkeypatch.setattr(engine, "providers", lambda: [CPU, OTHER, "ThirdExecutionProvider"])
    engine.loads.clear()
    again = probing(engine, tmp_path, OTHER, "ThirdExecutionProvider")
    again.load(model, facts if isinstance(facts, Beside) else HERE)
    assert engine.loads[:2] == [CPU, OTHER]


@pytest.mark.parametrize("fault", ["wrong", "none"])
def test_a_provider_that_answers_wrongly_or_not_at_all_is_out(tmp_path: Path, fault: str) -> None:
    engine = TwoProviders(adder(tmp_path / "other.onnx", 2) if fault == "wrong" else None)
    session = probing(engine, tmp_path).load(slow_adder(tmp_path / "m.onnx", 1), HERE)
    assert answer(session) == 1.0
    assert seen(tmp_path)[OTHER] == {"wrong": "it answers otherwise than the CPU", "none": "no such device"}[fault]


def test_a_provider_over_which_the_program_died_is_not_tried_again(tmp_path: Path) -> None:
    class Dying(TwoProviders):
        def load_on(self, path: Path, beside: Beside, provider: str) -> OrtSession:
            if provider != CPU:
                raise KeyboardInterrupt  # as if it had been killed: nothing is tidied up
            return super().load_on(path, beside, provider)

    model = adder(tmp_path / "m.onnx", 1)
    with pytest.raises(KeyboardInterrupt):
        probing(Dying(None), tmp_path).load(model, HERE)
    engine = TwoProviders(adder(tmp_path / "fast.onnx", 1))
    probing(engine, tmp_path).load(model, HERE)
    assert engine.loads == [CPU]
    assert seen(tmp_path)[OTHER] == "the program died while it was tried"


def test_a_provider_that_was_being_tried_when_the_program_was_told_to_stop_is_tried_again(tmp_path: Path) -> None:
    memory = ProviderMemory(tmp_path / FILE_NAME)
    memory.put("key", Entry(trying=OTHER))
    memory.close()
    assert ProviderMemory(tmp_path / FILE_NAME).get("key") == Entry()


def test_a_memory_that_cannot_be_read_costs_a_probe(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff{")
    engine = TwoProviders(adder(tmp_path / "fast.onnx", 1))
    probing(engine, tmp_path).load(adder(tmp_path / "m.onnx", 1), HERE)
    assert OTHER in seen(tmp_path)


def test_without_a_second_provider_nothing_is_tried_or_remembered(tmp_path: Path) -> None:
    engine = TwoProviders(None)
    probing(engine, tmp_path, CPU).load(adder(tmp_path / "m.onnx", 1), HERE)
    assert engine.loads == [CPU]
    assert not (tmp_path / FILE_NAME).exists()


async def test_a_release_that_fails_its_samples_on_another_provider_is_loaded_on_the_cpu(tmp_path: Path) -> None:
    # The other provider agrees on what the probe asks, and not on the sample.
    slow, other = slow_adder(tmp_path / "m.onnx", 1), capped_adder(tmp_path / "other.onnx", 1, most=50)
    server = ModelServer(probing(TwoProviders(other), tmp_path), Recorder(0.0), SystemClock())
    x = np.full((1, 4), 100, np.float32)
    (tmp_path / SAMPLES_FILE).write_bytes(encode_samples([Sample("large", {"x": x}, {"y": x + 1})]))
    terms = SelfTest(samples=SAMPLES_FILE, count=1, rules={"y": Close(rtol=0.0, atol=0.1)})
    samples = SamplesFile(tmp_path / SAMPLES_FILE, terms)
    candidate = await server.prepare(MODEL, Version("1"), slow, X, Y, samples=samples, extras=Extras(beside=HERE))
    assert candidate.tested
    assert seen(tmp_path)[OTHER] == "the release failed its checks on it"
    await server.discard(candidate)
    await server.close()


@pytest.mark.skipif(OPENVINO not in onnxruntime.get_available_providers(), reason="needs onnxruntime-openvino")
def test_a_real_second_provider(tmp_path: Path, real_models: tuple[Path, Path]) -> None:
    engine = ProbingEngine(OrtEngine(), (OPENVINO, CPU), ProviderMemory(tmp_path / FILE_NAME))
    raw = OrtEngine().load(real_models[0])
    session = engine.load(real_models[0], HERE)
    assert set(seen(tmp_path)) == {CPU, OPENVINO}
    assert all(value.endswith(" s") for value in seen(tmp_path).values())
    feeds = {"bytes": np.full((1, 2048), 65, np.int32)}
    answers = [one.run(feeds, ["target_label"])["target_label"] for one in (raw, session)]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-3)


def cached(engine: ProbingEngine, folder: Path) -> OptimisedModels:
    return OptimisedModels(
        folder / "o", engine, bytes_max=10**9, model_bytes_min=0, reserve_bytes=0, free=lambda _: 10**9
    )


def test_an_optimised_graph_is_kept_once_the_cpu_is_chosen(tmp_path: Path) -> None:
    engine = probing(TwoProviders(None), tmp_path)
    model, cache = adder(tmp_path / "m.onnx", 1), cached(engine, tmp_path)
    identity = Digest("sha256:" + "1" * 64)
    beside = Beside(identity=identity)
    assert not cache.takes(model, beside), "nothing was tried yet"
    engine.load(model, beside)
    assert cache.takes(model, beside)
    assert not cache.takes(model, Beside((tmp_path / "ops.so",), identity)), "what its operators mean is elsewhere"
    cache.load(MODEL, model, identity)
    assert cache.size
    assert not engine.doubt(model), "there is no other way than the CPU"


def test_nothing_is_kept_of_what_runs_on_another_provider(tmp_path: Path) -> None:
    engine = probing(TwoProviders(adder(tmp_path / "fast.onnx", 1)), tmp_path)
    model, cache = slow_adder(tmp_path / "m.onnx", 1), cached(engine, tmp_path)
    engine.load(model, HERE)
    assert not cache.takes(model, HERE)


def test_only_the_cpu_is_fed_other_weights(tmp_path: Path) -> None:
    model, engine = heads(tmp_path, 1, 2), OrtEngine()
    (other,) = [name for name in engine.providers() if name != CPU][:1] or pytest.skip("one provider only")
    assert [spec.name for spec in engine.load(model).overridable] == ["one", "two"]
    assert engine.load_on(model, Beside(), other).overridable == ()
