"""Patches that were released are applied for ever: each file here was written by the build that introduced its format.

There is one for each way in which a patch can write something, in each codec, with the files it is between. They are
never written again; `python -m tests.golden.test_delta_golden` adds those that are missing.
"""

from pathlib import Path

import pytest

from common import delta
from common.artifact.source import BytesSource
from tests.patch_pairs import pairs
from tests.patches import rebuilt, reference_to

FOLDER = Path(__file__).parent / "delta"
PATCHES = sorted(FOLDER.glob("*.patch"))


def base_and_target(path: Path) -> tuple[bytes, bytes]:
    return path.with_suffix(".base").read_bytes(), path.with_suffix(".target").read_bytes()


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_released_patch_still_gives_its_target(path: Path) -> None:
    base, target = base_and_target(path)
    assert rebuilt(base, path.read_bytes(), target) == target


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_released_patch_still_says_what_it_is_for(path: Path) -> None:
    base, target = base_and_target(path)
    summary = delta.inspect(BytesSource(path.read_bytes()))
    assert (summary.base, summary.base_bytes) == (reference_to(base).digest[7:23], len(base))
    assert (summary.target, summary.target_bytes) == (reference_to(target).digest[7:23], len(target))
    assert path.stem.startswith(f"v1-{summary.codec}-")


def test_every_way_to_write_something_has_a_released_patch() -> None:
    assert {path.stem for path in PATCHES} >= {stem(each.codec, each.name) for each in pairs()}


def test_a_patch_is_what_its_page_says_byte_by_byte() -> None:
    path = FOLDER / "v1-tensor-pco.1-literal.patch"
    patch, (base, target) = path.read_bytes(), base_and_target(path)
    assert patch[:9].hex(" ") == "89 46 44 0a 01 02 bc 05 00"
    assert patch[9:17].hex() == reference_to(base).digest[7:23]
    assert patch[17:25].hex() == reference_to(target).digest[7:23]
    assert patch[25:].hex(" ") == "05 03 03 0d 00 00 6e 65 77"


def stem(codec: str, name: str) -> str:
    return f"v1-{codec}-{name.replace(' ', '-')}"


def write_missing() -> None:
    FOLDER.mkdir(exist_ok=True)
    for pair in pairs():
        path = FOLDER / f"{stem(pair.codec, pair.name)}.patch"
        if not path.exists():
            path.write_bytes(pair.patch)
            path.with_suffix(".base").write_bytes(pair.base)
            path.with_suffix(".target").write_bytes(pair.target)


if __name__ == "__main__":
    write_missing()
