"""`ferry demo` keeps every promise of its story, and says so with its exit status."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from controller.cli.demo import features
from tests.conftest import MODELS
from tests.e2e.world import until

pytestmark = pytest.mark.e2e

WITHIN_S = 380.0


@pytest.mark.timeout(400)
def test_the_demo_holds_every_promise(real_models: tuple[Path, Path]) -> None:
    command = [str(Path(sys.executable).parent / "ferry"), "demo", "--json", "--models", str(MODELS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as told:
        try:
            output, story = told.communicate(timeout=WITHIN_S)
        finally:
            told.terminate()  # it ends its own fleet; nothing to do if it has ended
    assert told.returncode == 0, story[-4000:] + output[-4000:]
    figures = json.loads(output)
    assert figures["failed_requests"] == 0
    assert figures["requests"] > 0
    assert min(figures["not_modified"].values()) >= 1
    by_version = {release["release"].rpartition("@")[2]: release for release in figures["releases"]}
    assert by_version["3"]["moved_percent"] < 2
    assert by_version["4"]["state"] == "rolled_back"
    assert by_version["4"]["devices"] == 1
    assert "4" not in figures["answers_by_version"] or by_version["4"]["outcomes"] == {"rolled_back": 1}
    assert all(expectation["held"] for expectation in figures["expectations"])


def test_the_preprocessing_is_the_models_own(real_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dotenv", reason="the magika package needs it")
    monkeypatch.syspath_prepend(str(MODELS / "magika-0.6.3"))
    from magika import Magika
    from magika.types.seekable import Seekable

    edges = [b"x" * size for size in (9, 1023, 1024, 1025, 4095, 4096, 4097, 9000)]
    padded = [b" \n\t" * 50 + content + b"\r\n " * 50 for content in edges]
    for content in [*edges, *padded, Path(__file__).read_bytes(), bytes(range(256)) * 40]:
        theirs = Magika._extract_features_from_seekable(Seekable(io.BytesIO(content)), 1024, 0, 1024, 256, 4096, False)
        assert features.tokens(content) == [*theirs.beg, *theirs.end]


def test_a_demo_that_is_told_to_stop_leaves_nothing_behind(real_models: tuple[Path, Path], tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "ferry"), "demo", "--models", str(MODELS)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as told:
        try:
            until(lambda: list(tmp_path.glob("ferry-demo-*/device-1.ready.json")), "the first device serves")
        finally:
            told.terminate()
            told.wait(60)
    assert list(tmp_path.iterdir()) == []
    assert not [one for one in psutil.process_iter() if str(tmp_path) in " ".join(arguments_of(one))]


def arguments_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
