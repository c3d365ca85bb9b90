"""Publishing with steps around the model and with libraries: real plug-ins, a real reference run, a real API."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from common.artifact.manifest import ReleaseManifest, Variant
from common.artifact.samples import decode_samples
from common.artifact.selftest import SAMPLES_FILE
from common.ids import DeviceId, ModelName
from common.pipelines import installed
from common.pipelines.installed import digest_of_plugin, find_plugin
from common.wire import ReportedModel, ReportedState
from controller.cli import cli
from tests.integration.api_peer import ApiPeer, serving_in_thread
from tests.integration.small_models import Y, adder, upper_case
from tests.plugin_wheels import make_wheel, unpack

Ferry = Callable[..., Result]
PIPELINE = """
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 4]

[[before]]
plugin = "acme.add"
[before.parameters]
amount = 10

[[after]]
plugin = "edgeferry.top_k"
version = "1"
[after.parameters]
k = 1
labels = ["a", "b", "c", "d"]
"""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApiPeer, asyncio.AbstractEventLoop]]:
    with serving_in_thread(tmp_path_factory.mktemp("api")) as peer:
        yield peer


@pytest.fixture
def api(peer: tuple[ApiPeer, asyncio.AbstractEventLoop]) -> ApiPeer:
    return peer[0]


@pytest.fixture
def ferry(api: ApiPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ferry:
    """Runs `ferry release` with these words; `acme.add` is installed."""
    monkeypatch.setenv("FERRY_CONTEXTS", str(tmp_path / "contexts.json"))
    monkeypatch.setenv("FERRY_URL", api.url)
    monkeypatch.setenv("FERRY_TOKEN", api.token)
    monkeypatch.setattr(installed, "_imported", {})
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        monkeypatch.delitem(sys.modules, name)
    unpack(make_wheel(tmp_path), tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return lambda *words: CliRunner().invoke(cli, ["release", *(str(word) for word in words)])


def published(ferry: Ferry, *words: object) -> Variant:
    """The default variant of the release that was published."""
    result = ferry("publish", *words, "-o", "json")
    assert result.exit_code == 0, result.stderr
    return msgspec.convert(msgspec.json.decode(result.stdout)["manifest"], ReleaseManifest).variants["default"]


def written(folder: Path, text: str = PIPELINE) -> Path:
    (folder / "pipeline.toml").write_text(text)
    return folder / "pipeline.toml"


def test_steps_are_pinned_to_what_is_installed_here_and_samples_go_through_them(
    ferry: Ferry, api: ApiPeer, tmp_path: Path
) -> None:
    np.savez(tmp_path / "samples.npz", x=np.array([[0, 1, 2, 9], [7, 1, 1, 1]], np.float32))
    words = (adder(tmp_path / "m.onnx", 1), "--pipeline", written(tmp_path), "--samples", tmp_path / "samples.npz")
    variant = published(ferry, "kinds@1", *words)
    pipeline = variant.pipeline
    assert pipeline
    assert (pipeline.before[0].version, pipeline.before[0].code) == (
        "1.0",
        (digest_of_plugin(find_plugin("acme.add")),),
    )
    assert [spec.name for spec in variant.outputs] == ["top_indices", "top_scores", "top_labels"]
    assert pipeline.model_outputs == Y
    path = api.blobs.path(variant.files[SAMPLES_FILE].digest)
    assert path
    one, two = decode_samples(path.read_bytes())
    assert (one.outputs["top_labels"].tolist(), two.outputs["top_labels"].tolist()) == ([["d"]], [["a"]])
    assert one.outputs["top_scores"].tolist() == [[20.0]]
    assert "same bytes" in ferry("publish", "kinds@1", *words).stderr
    assert "acme.add 1.0" in ferry("show", "kinds@1").stdout
    other = ferry("publish", "kinds@1", adder(tmp_path / "m.onnx", 1))
    assert other.exit_code != 0
    assert "steps" in other.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nonsense = 1", "unknown field"),
        ("[[before]]\nplugin = 'acme.add'", "declare them with [[inputs]]"),
        (PIPELINE.replace("acme.add", "acme.none"), "there is no plug-in 'acme.none'"),
        (PIPELINE.replace("shape = [-1, 4]", "shape = [4]"), "the model takes x FP32 [-1, 4]"),
        (PIPELINE.replace("k = 1", "k = 9"), "9 of 4 classes"),
        (PIPELINE.replace('version = "1"', 'version = "7"'), "no version 7"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_before_anything_is_uploaded(
    ferry: Ferry, api: ApiPeer, tmp_path: Path, text: str, complaint: str
) -> None:
    before = sum(1 for _ in api.blobs.all())
    refused = ferry("publish", "kinds@2", adder(tmp_path / "m.onnx", 2), "--pipeline", written(tmp_path, text))
    assert refused.exit_code == 2
    assert complaint in refused.stderr
    assert sum(1 for _ in api.blobs.all()) == before


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
def test_libraries_are_files_of_the_release_and_named_in_its_manifest(ferry: Ferry, tmp_path: Path) -> None:
    (tmp_path / "ops.c").write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-o", str(tmp_path / "ops.so"), str(tmp_path / "ops.c")], check=True)
    model = upper_case(tmp_path / "m.onnx")
    variant = published(ferry, "upper@1", model, "--custom-ops", tmp_path / "ops.so")
    assert variant.custom_ops == ("ops.so",)
    assert variant.data_files == ()
    (tmp_path / "text.so").write_text("no library")
    refused = ferry("publish", "upper@2", model, "--custom-ops", tmp_path / "text.so")
    assert refused.exit_code == 2
    assert "custom_ops.default.text.so: it is no ELF file" in refused.stderr.replace("\n", " ")


@pytest.mark.usefixtures("ferry")
def test_an_operator_sees_what_a_device_waits_for(peer: tuple[ApiPeer, asyncio.AbstractEventLoop]) -> None:
    api, loop = peer
    detail = "plugin_missing: acme.add: there is no plug-in"
    model = ReportedModel(
        model=ModelName("kinds"), running=None, artifact=None, phase="fetching", generation=1, detail=detail
    )
    state = ReportedState(device=DeviceId("cam-1"), epoch=1, seq=1, sent_at=0.0, generation=1, models=(model,))

    async def report() -> int:
        token = (await api.join("cam-1")).device_token
        path = "/v1/devices/cam-1/reported"
        return (await api.ask("PUT", path, data=msgspec.json.encode(state), token=token)).status

    assert asyncio.run_coroutine_threadsafe(report(), loop).result(60) == 204
    shown = CliRunner().invoke(cli, ["device", "show", "cam-1"])
    assert f"kinds waits: {detail}" in shown.stdout
