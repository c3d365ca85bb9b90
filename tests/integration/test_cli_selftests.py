"""Publishing with samples from the command line: real models, a real reference run, a real API."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto

from common.artifact.samples import Sample, decode_samples
from common.artifact.selftest import SAMPLES_FILE, SAMPLES_MAX
from controller.cli import cli
from tests.integration.api_peer import ApiPeer, serving_in_thread
from tests.integration.small_models import adder, identity, noisy, raises_unless_zero

Ferry = Callable[..., Result]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiPeer]:
    with serving_in_thread(tmp_path_factory.mktemp("api")) as (api, _):
        yield api


@pytest.fixture
def ferry(api: ApiPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ferry:
    """Runs `ferry` with these words."""
    monkeypatch.setenv("FERRY_CONTEXTS", str(tmp_path / "contexts.json"))
    monkeypatch.setenv("FERRY_URL", api.url)
    monkeypatch.setenv("FERRY_TOKEN", api.token)
    return lambda *words: CliRunner().invoke(cli, ["release", *(str(word) for word in words)])


def published(ferry: Ferry, *words: object) -> Any:
    """The variants of the release that was published."""
    result = ferry("publish", *words, "-o", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["manifest"]["variants"]


def samples_in(api: ApiPeer, variant: Any) -> tuple[Sample, ...]:
    path = api.blobs.path(variant["files"][SAMPLES_FILE]["digest"])
    assert path is not None
    return decode_samples(path.read_bytes())


def stored(folder: Path, name: str = "samples.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def test_what_the_model_answers_here_is_what_devices_must_answer(
    ferry: Ferry, api: ApiPeer, tmp_path: Path, real_models: tuple[Path, Path]
) -> None:
    texts = np.random.default_rng(1).integers(32, 127, (3, 2048))  # int64, as numpy makes them
    words = ("--samples", stored(tmp_path, bytes=texts), "--latency-max", "0.2")
    variant = published(ferry, "magika@1", real_models[0], "--variant", f"small={real_models[1]}", *words)
    for name, model in zip(("default", "small"), real_models, strict=True):
        samples = samples_in(api, variant[name])
        assert [sample.name for sample in samples] == ["0", "1", "2"]
        session = onnxruntime.InferenceSession(str(model))
        for sample, text in zip(samples, texts, strict=True):
            np.testing.assert_array_equal(sample.inputs["bytes"], text[np.newaxis].astype(np.int32))
            (expected,) = session.run(["target_label"], {"bytes": text[np.newaxis].astype(np.int32)})
            np.testing.assert_allclose(sample.outputs["target_label"], expected, atol=1e-6)
        assert variant[name]["self_test"]["latency_max_s"] == 0.2
        assert variant[name]["self_test"]["count"] == 3
    again = ferry("publish", "magika@1", real_models[0], "--variant", f"small={real_models[1]}", *words)
    assert "same bytes" in again.stderr
    shown = ferry("show", "magika@1").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("small") and "rtol=" in line]
    assert line.split()[:3] == ["small", "3", "target_label"]
    assert line.endswith("0.2 s")
    assert SAMPLES_FILE in shown


def test_without_samples_there_is_no_self_test(ferry: Ferry, tmp_path: Path) -> None:
    variants = published(ferry, "adder@0", adder(tmp_path / "m.onnx", 1))
    assert "self_test" not in variants["default"]
    assert "no self-test" in ferry("show", "adder@0").stdout
    refused = ferry("publish", "adder@0.1", tmp_path / "m.onnx", "--tolerance", "top1")
    assert refused.exit_code == 2
    assert "--samples" in refused.stderr


def test_a_folder_holds_a_file_for_each_sample_in_any_shape(ferry: Ferry, api: ApiPeer, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    stored(tmp_path / "folder", "large.npz", x=np.ones((7, 4)))
    stored(tmp_path / "folder", "small.npz", x=np.ones((1, 4), np.float32))
    variant = published(ferry, "adder@1", adder(tmp_path / "m.onnx", 2), "--samples", tmp_path / "folder")["default"]
    large, small = samples_in(api, variant)
    assert (large.name, large.outputs["y"].shape, small.name) == ("large", (7, 4), "small")
    np.testing.assert_array_equal(small.outputs["y"], np.full((1, 4), 3, np.float32))


def test_elements_of_an_array_with_one_more_axis_are_samples_too(ferry: Ferry, api: ApiPeer, tmp_path: Path) -> None:
    batches = stored(tmp_path, x=np.zeros((2, 5, 4), np.float16))
    variant = published(ferry, "adder@2", adder(tmp_path / "m.onnx", 2), "--samples", batches)["default"]
    assert [sample.inputs["x"].shape for sample in samples_in(api, variant)] == [(5, 4), (5, 4)]


def test_expected_outputs_of_the_publisher_are_what_devices_compare_with(
    ferry: Ferry, api: ApiPeer, tmp_path: Path
) -> None:
    model, inputs = adder(tmp_path / "m.onnx", 1), stored(tmp_path, x=np.zeros((2, 4)))
    near = stored(tmp_path, "near.npz", y=np.full((2, 4), 1.0004))
    variant = published(ferry, "adder@3", model, "--samples", inputs, "--expected", near)["default"]
    assert float(samples_in(api, variant)[0].outputs["y"][0, 0]) == pytest.approx(1.0004)
    far = stored(tmp_path, "far.npz", y=np.full((2, 4), 2.0))
    refused = ferry("publish", "adder@4", model, "--samples", inputs, "--expected", far)
    assert refused.exit_code == 2
    for words in ("variants.default: the answers are not the expected ones", "sample '0': output 'y'", "off by 1"):
        assert words in refused.stderr
    assert ferry("show", "adder@4").exit_code == 3, "nothing is published"


def test_each_variant_and_output_has_its_own_tolerance(ferry: Ferry, tmp_path: Path) -> None:
    model, inputs = adder(tmp_path / "m.onnx", 1), stored(tmp_path, x=np.zeros((1, 4)))
    options = ("--tolerance", "rtol=0.5", "--tolerance", "variant=int8,output=y,top1", "--latency-max", "int8=0.5")
    variants = published(ferry, "adder@5", model, "--variant", f"int8={model}", "--samples", inputs, *options)
    assert variants["default"]["self_test"]["rules"] == {"y": {"rule": "close", "rtol": 0.5, "atol": 1e-4}}
    assert variants["int8"]["self_test"]["rules"] == {"y": {"rule": "top1"}}
    assert "latency_max_s" not in variants["default"]["self_test"]
    assert variants["int8"]["self_test"]["latency_max_s"] == 0.5


def test_strings_are_compared_exactly(ferry: Ferry, api: ApiPeer, tmp_path: Path) -> None:
    model = identity(tmp_path / "m.onnx", TensorProto.STRING, ("n", 2))
    inputs = stored(tmp_path, x=np.array([["a", "été"], ["", "b"]]))
    variant = published(ferry, "texts@1", model, "--samples", inputs)["default"]
    assert variant["self_test"]["rules"] == {"y": {"rule": "exact"}}
    assert samples_in(api, variant)[0].outputs["y"].tolist() == [["a", "été"]]


def test_made_up_samples_are_always_the_same_and_only_on_request(ferry: Ferry, api: ApiPeer, tmp_path: Path) -> None:
    model = adder(tmp_path / "m.onnx", 1)
    one, two = (published(ferry, f"adder@{version}", model, "--samples", "auto:3")["default"] for version in (6, 7))
    assert one == two
    assert [sample.name for sample in samples_in(api, one)] == ["auto-0", "auto-1", "auto-2"]


def test_a_model_that_answers_anew_each_time_is_refused_with_the_way_out(ferry: Ferry, tmp_path: Path) -> None:
    refused = ferry("publish", "noise@1", noisy(tmp_path / "m.onnx"), "--samples", "auto")
    assert refused.exit_code == 2
    assert "it answers the same input in another way the next time" in refused.stderr
    assert "--tolerance variant=default" in refused.stderr


def test_a_tolerance_that_this_machine_alone_breaks_is_refused(
    ferry: Ferry, tmp_path: Path, real_models: tuple[Path, Path]
) -> None:
    texts = stored(tmp_path, bytes=np.random.default_rng(2).integers(32, 127, (8, 2048)))
    refused = ferry("publish", "strict@1", real_models[0], "--samples", texts, "--tolerance", "rtol=0,atol=0")
    assert refused.exit_code == 2
    assert "the answers depend on how the graph is optimised" in refused.stderr


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"z": np.zeros((1, 4))}, "the model has no 'z'"),
    "another shape": ({"x": np.zeros((1, 5))}, "[1, 5] for FP32 [any, 4]"),
    "no sample axis": ({"x": np.zeros(4)}, "[4] for FP32 [any, 4]"),
    "another kind": ({"x": np.zeros((1, 4), np.int64)}, "int64 for FP32 [any, 4]"),
    "no samples": ({"x": np.zeros((0, 4))}, "there are no samples"),
    "too many": ({"x": np.zeros((SAMPLES_MAX + 1, 4))}, f"at most {SAMPLES_MAX}"),
    "objects": ({"x": np.array([[{}] * 4], object)}, "without Python objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_samples_that_do_not_fit_the_model_are_refused_before_anything_is_sent(
    ferry: Ferry, tmp_path: Path, name: str
) -> None:
    arrays, words = BAD[name]
    refused = ferry("publish", "bad@1", adder(tmp_path / "m.onnx", 1), "--samples", stored(tmp_path, **arrays))
    assert refused.exit_code == 2
    assert words in refused.stderr
    assert ferry("show", "bad@1").exit_code == 3


@pytest.mark.parametrize("what", ["absent.npz", "text.npz", "array.npz", "auto:x", "auto:0", "empty"])
def test_what_is_no_file_of_samples_is_refused(ferry: Ferry, tmp_path: Path, what: str) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros((1, 4)))
    (tmp_path / "empty").mkdir()
    samples = what if what.startswith("auto") else tmp_path / what
    refused = ferry("publish", "bad@1", adder(tmp_path / "m.onnx", 1), "--samples", samples)
    assert refused.exit_code == 2, refused.output
    assert "samples" in refused.stderr


def test_integers_out_of_range_are_refused_and_not_wrapped(ferry: Ferry, tmp_path: Path) -> None:
    model = identity(tmp_path / "m.onnx", TensorProto.INT8, ("n",))
    refused = ferry("publish", "bytes@1", model, "--samples", stored(tmp_path, x=np.array([[300]])))
    assert refused.exit_code == 2
    assert "outside -128 to 127" in refused.stderr


def test_an_input_that_the_model_fails_on_is_named(ferry: Ferry, tmp_path: Path) -> None:
    inputs = stored(tmp_path, x=np.array([[0.0] * 4, [9.0] * 4]))
    refused = ferry("publish", "bad@2", raises_unless_zero(tmp_path / "m.onnx"), "--samples", inputs)
    assert refused.exit_code == 2
    assert "samples: '1' on m.onnx" in refused.stderr


def test_without_a_runtime_samples_are_refused_with_what_to_install(api: ApiPeer, tmp_path: Path) -> None:
    """A process that cannot import onnxruntime: publishing works, samples say what is missing."""
    model = adder(tmp_path / "m.onnx", 9)
    program = "import sys; sys.modules['onnxruntime'] = None; from controller.cli import main; main()"
    environment = {
        "FERRY_URL": api.url,
        "FERRY_TOKEN": api.token,
        "PYTHONPATH": ":".join(sys.path),
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", program, "release", "publish", "adder@9", str(model)]
    plain, tested = (
        subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=environment, timeout=60)
        for words in ((), ("--samples", "auto"))
    )
    assert plain.returncode == 0, plain.stderr
    assert tested.returncode == 2
    assert "edgeferry[selftest]" in tested.stderr
