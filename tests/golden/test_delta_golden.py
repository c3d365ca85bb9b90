"""Patches that were released are applied for ever: each file here was written by the build that introduced its format.

A new format gets a new file beside the old ones; the old ones are never written again.
"""

from pathlib import Path

import pytest

from common import delta
from common.artifact.source import BytesSource
from tests.patches import rebuilt, reference_to

FOLDER = Path(__file__).parent / "delta"
BASE = (FOLDER / "base.bin").read_bytes()
TARGET = (FOLDER / "target.bin").read_bytes()
PATCHES = sorted(FOLDER.glob("*.patch"))


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.name)
def test_a_released_patch_still_gives_its_target(path: Path) -> None:
    assert rebuilt(BASE, path.read_bytes(), TARGET) == TARGET


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.name)
def test_a_released_patch_still_says_what_it_is_for(path: Path) -> None:
    summary = delta.inspect(BytesSource(path.read_bytes()))
    assert (summary.base, summary.target) == (reference_to(BASE), reference_to(TARGET))
    assert path.stem == f"v1-{summary.codec}"


def test_every_codec_that_this_build_applies_has_a_released_patch() -> None:
    assert {path.stem.removeprefix("v1-") for path in PATCHES} >= set(delta.CODECS)


def test_the_first_format_is_what_its_page_says_byte_by_byte() -> None:
    patch = (FOLDER / "v1-blocks-zstd.1.patch").read_bytes()
    assert patch[:8] == b"\x89FERRYD\n"
    assert int.from_bytes(patch[8:10], "little") == 1
    assert patch[10:26] == b"blocks-zstd.1\0\0\0"
    assert patch[26:58].hex() == reference_to(BASE).digest.removeprefix("sha256:")
    assert int.from_bytes(patch[58:66], "little") == len(BASE)
    assert patch[66:98].hex() == reference_to(TARGET).digest.removeprefix("sha256:")
    assert int.from_bytes(patch[98:106], "little") == len(TARGET)
    operations, table_bytes, literals, frame_bytes = (
        int.from_bytes(patch[at : at + 4], "little") for at in range(106, 122, 4)
    )
    assert (operations, literals) == (4, 20)
    assert len(patch) == 122 + table_bytes + frame_bytes
    assert patch[122:126] == patch[122 + table_bytes :][:4] == b"\x28\xb5\x2f\xfd"
