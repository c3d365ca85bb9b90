"""From `ferry release publish --serving` to a device that serves a release as its publisher said."""

import json
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from common.artifact import decode_manifest
from common.artifact.serving import Route, ServingTerms
from common.ids import Digest, ModelName
from controller.cli import cli
from edge_agent.executor.adopting import adopt
from tests.integration.agent_bench import device_at
from tests.integration.api_peer import ApiPeer, serving_in_thread
from tests.integration.release_desk import MODEL, ReleaseDesk
from tests.integration.small_models import adder

FILE = """
cache_bytes = 2_000_000

[[routes]]
when = 'load.waiting > 4 && input["x"].shape[0] == 1'
model = "adder-small"
"""
TERMS = ServingTerms(2_000_000, (Route('load.waiting > 4 && input["x"].shape[0] == 1', ModelName("adder-small")),))
Ferry = Callable[..., Result]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiPeer]:
    with serving_in_thread(tmp_path_factory.mktemp("api")) as (api, _):
        yield api


@pytest.fixture
def ferry(api: ApiPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ferry:
    """Runs `ferry release` with these words."""
    monkeypatch.setenv("FERRY_CONTEXTS", str(tmp_path / "contexts.json"))
    monkeypatch.setenv("FERRY_URL", api.url)
    monkeypatch.setenv("FERRY_TOKEN", api.token)
    return lambda *words: CliRunner().invoke(cli, ["release", *(str(word) for word in words)])


def written(folder: Path, text: str, name: str = "serving.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_the_terms_are_signed_with_the_release_and_shown(ferry: Ferry, api: ApiPeer, tmp_path: Path) -> None:
    model, small = adder(tmp_path / "m.onnx", 1), adder(tmp_path / "s.onnx", 2)
    file, other = written(tmp_path, FILE), written(tmp_path, "cache_bytes = 5_000", "other.toml")
    words = ("adder@1", model, "--variant", f"small={small}", "--serving", file, "--serving", f"small={other}")
    result = ferry("publish", *words, "-o", "json")
    assert result.exit_code == 0, result.stderr
    path = api.blobs.path(Digest(json.loads(result.stdout)["envelope"]["digest"]))
    assert path is not None
    variants = decode_manifest(b64decode(json.loads(path.read_bytes())["payload"])).variants
    assert (variants["default"].serving, variants["small"].serving) == (TERMS, ServingTerms(5_000))
    shown = ferry("show", "adder@1").stdout
    assert "to adder-small when load.waiting > 4" in shown
    assert "load.waiting > 4" in shown
    assert "same bytes" in ferry("publish", *words).stderr


def test_a_release_without_terms_says_nothing_about_serving(ferry: Ferry, tmp_path: Path) -> None:
    model = adder(tmp_path / "m.onnx", 1)
    result = ferry("publish", "adder@2", model, "--serving", written(tmp_path, ""), "-o", "json")
    assert "serving" not in json.loads(result.stdout)["manifest"]["variants"]["default"]
    assert "same bytes" in ferry("publish", "adder@2", model).stderr
    assert "SERVING" not in ferry("show", "adder@2").stdout


def test_a_comparison_shows_the_terms_that_changed(ferry: Ferry, tmp_path: Path) -> None:
    model = adder(tmp_path / "m.onnx", 1)
    for version, text in (("7", FILE), ("8", FILE.replace("> 4", "> 6")), ("9", "")):
        assert ferry("publish", f"adder@{version}", model, "--serving", written(tmp_path, text)).exit_code == 0
    shown = ferry("diff", "adder@7", "adder@8").stdout
    assert "rule 1" in shown
    assert "load.waiting > 4" in shown
    assert "load.waiting > 6" in shown
    assert "answers kept" not in shown
    changes = json.loads(ferry("diff", "adder@8", "adder@9", "-o", "json").stdout)["variants"][0]["serving"]
    assert [(change["term"], change["new"]) for change in changes] == [("answers kept", "-"), ("rule 1", "-")]
    assert "SERVING" not in ferry("diff", "adder@9", "adder@9").stdout


def test_other_terms_are_another_release(ferry: Ferry, tmp_path: Path) -> None:
    model = adder(tmp_path / "m.onnx", 1)
    assert ferry("publish", "adder@3", model, "--serving", written(tmp_path, FILE)).exit_code == 0
    for words in ((), ("--serving", written(tmp_path, "cache_bytes = 1"))):
        refused = ferry("publish", "adder@3", model, *words)
        assert refused.exit_code != 0
        assert "terms of serving" in refused.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache_bytes = ", "not TOML"),
        ("cache_byte = 1", "unknown field `cache_byte`"),
        ("cache_bytes = -1", ">= 0 - at `$.cache_bytes`"),
        ("[[routes]]\nwhen = 'true'", "missing required field `model`"),
        ("[[routes]]\nwhen = 'oops('\nmodel = 'small'", "serving.default.routes[0].when: line 1"),
        ("[[routes]]\nwhen = 'cpu > 1'\nmodel = 'small'", "known names: input, load, parameters, priority"),
        ("[[routes]]\nwhen = 'true'\nmodel = 'adder'", "serving.default.routes[0].model: leads back to adder"),
        ("[padding.w]\naxis = 1", "serving.default.padding.w: the model has no input 'w'"),
        ("[padding.x]\naxis = 1", "serving.default.padding.x.axis: axis 1 is not open"),
    ],
)
def test_terms_that_no_device_could_keep_are_not_published(ferry: Ferry, tmp_path: Path, text: str, said: str) -> None:
    model = adder(tmp_path / "m.onnx", 1)
    refused = ferry("publish", "adder@4", model, "--serving", written(tmp_path, text))
    assert refused.exit_code == 2, refused.stderr
    assert said in refused.stderr
    assert ferry("show", "adder@4").exit_code == 3


def test_files_that_are_not_there_and_variants_that_do_not_exist_are_named(
    ferry: Ferry, api: ApiPeer, tmp_path: Path
) -> None:
    model = adder(tmp_path / "m.onnx", 1)
    assert "cannot read" in ferry("publish", "adder@5", model, "--serving", "int8=absent.toml").stderr
    assert ferry("publish", "adder@5", model).exit_code == 0
    digest = json.loads(ferry("show", "adder@5", "-o", "json").stdout)["manifest"]["variants"]["default"]["files"]
    files = {name: one["digest"] for name, one in digest.items()}
    body = {"model": "adder", "version": "6", "variants": {"default": files}}
    headers = {"Authorization": f"Bearer {api.token}"}
    for serving, field in (({"int8": {"cache_bytes": 1}}, "serving.int8"), ({"default": {"cache": 1}}, "")):
        answer = httpx.post(f"{api.url}/v1/releases", json=body | {"serving": serving}, headers=headers)
        problem: Any = answer.json()
        assert answer.status_code in {400, 422}, problem
        assert field in json.dumps(problem)


@pytest.fixture
async def desk() -> AsyncIterator[ReleaseDesk]:
    desk = ReleaseDesk()
    await desk.start()
    yield desk
    await desk.stop()


async def test_a_device_serves_a_release_on_its_terms_also_after_a_restart_and_without_its_journal(
    tmp_path: Path, desk: ReleaseDesk, real_models: tuple[Path, Path]
) -> None:
    order = desk.order(desk.release("1", real_models[0].read_bytes(), serving=TERMS))
    async with device_at(tmp_path, desk) as device:
        await device.executor.accept(order)
        await device.finished(1)
        (kept,) = device.server.kept_terms()
        assert (kept.model, kept.version, kept.cache_bytes) == (MODEL, "1", 2_000_000)
        (rule,) = kept.routes
        assert rule.skipped == "adder-small is not served here"
        assert [await device.ask(), await device.ask()] == [("1", True), ("1", True)]
        assert device.server.served(MODEL).statistics.hits == 1
    async with device_at(tmp_path, desk) as device:
        (kept,) = device.server.kept_terms()
        assert kept.cache_bytes == 2_000_000
        (state,) = adopt(device.executor._parts)
        assert state.installed is not None
        assert state.installed.serving == TERMS
        again = desk.order(desk.release("2", real_models[1].read_bytes()))
        await device.executor.accept(again)
        await device.finished(2)
        assert device.server.kept_terms() == (), "the next release says nothing"
