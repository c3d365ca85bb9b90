"""`ferry demo` keeps every promise of its story, and says so with its exit status."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from controller.cli.demo import features
from tests.conftest import MODELS

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(400)
def test_the_demo_holds_every_promise(real_models: tuple[Path, Path]) -> None:
    command = [str(Path(sys.executable).parent / "ferry"), "demo", "--json", "--models", str(MODELS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    figures = json.loads(done.stdout)
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
