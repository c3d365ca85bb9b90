"""`ferry delta` on real files: what it leaves on the disk, and what it says."""

import errno
import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from common.errors import IntegrityFailure, InvalidInput, StorageFull
from controller.cli.delta import _new_file, delta
from tests.patches import reference_to

BASE = random.Random(21).randbytes(100_000)
TARGET = BASE[:50_000] + b"changed" + BASE[50_007:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "old.onnx").write_bytes(BASE)
    (tmp_path / "new.onnx").write_bytes(TARGET)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(delta, [str(argument) for argument in arguments])


def made(folder: Path) -> Path:
    patch = folder / "p.patch"
    assert run("make", folder / "old.onnx", folder / "new.onnx", "-o", patch).exit_code == 0
    return patch


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_make_then_apply_gives_the_new_file(folder: Path) -> None:
    patch = made(folder)
    result = run("apply", folder / "old.onnx", patch, "-o", folder / "again.onnx")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (folder / "again.onnx").read_bytes() == TARGET
    assert reference_to(TARGET).digest in result.stderr
    assert names(folder) == {"old.onnx", "new.onnx", "p.patch", "again.onnx"}


def test_make_says_what_the_patch_saves(folder: Path) -> None:
    result = run("make", folder / "old.onnx", folder / "new.onnx", "-o", folder / "p.patch")
    size = (folder / "p.patch").stat().st_size
    assert f"{size} bytes, 0." in result.stderr
    assert "% of the new file's 100000" in result.stderr


def test_inspect_shows_a_table_or_json(folder: Path) -> None:
    patch = made(folder)
    table = run("inspect", patch).stdout
    assert reference_to(BASE).digest[:23] in table
    assert "literal" in table
    figures = json.loads(run("inspect", patch, "-o", "json").stdout)
    assert figures["target"] == reference_to(TARGET).digest[7:23]
    written = {kind["kind"]: kind["output_bytes"] for kind in figures["operations"]}
    assert written == {"control": 0, "copy": 99_993, "literal": 7}
    assert figures["patch_bytes"] == patch.stat().st_size


def test_inspect_tells_what_was_done_for_each_tensor(real_models: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = real_models
    assert run("make", old, new, "-o", tmp_path / "p.patch").exit_code == 0
    figures = json.loads(run("inspect", tmp_path / "p.patch", "--model", new, "-o", "json").stdout)
    tensors = {each["name"]: each for each in figures["tensors"]}
    assert len(tensors) > 20
    for each in tensors.values():
        assert sum(each["output_bytes"].values()) >= max(each["shape"], default=0)
    largest = max(tensors.values(), key=lambda each: sum(each["output_bytes"].values()))
    table = run("inspect", tmp_path / "p.patch", "--model", new).stdout
    assert f"{largest['dtype'].lower()}[{','.join(map(str, largest['shape']))}]" in table
    assert str(largest["patch_bytes"]) in table


def test_apply_checks_the_digest_it_is_told(folder: Path) -> None:
    patch = made(folder)
    good, other = reference_to(TARGET).digest, reference_to(BASE).digest
    assert run("apply", folder / "old.onnx", patch, "-o", folder / "a.onnx", "--target", good).exit_code == 0
    refused = run("apply", folder / "old.onnx", patch, "-o", folder / "b.onnx", "--target", other)
    assert isinstance(refused.exception, IntegrityFailure)
    wrong = run("apply", folder / "old.onnx", patch, "-o", folder / "b.onnx", "--target", "sha256:123")
    assert isinstance(wrong.exception, InvalidInput)
    assert not (folder / "b.onnx").exists()


def test_a_patch_for_devices_without_pcodec_can_be_asked_for(folder: Path) -> None:
    arguments = ["make", folder / "old.onnx", folder / "new.onnx", "-o", folder / "z.patch", "--codec"]
    assert run(*arguments, "tensor-zstd.1").exit_code == 0
    assert "tensor-zstd.1" in run("inspect", folder / "z.patch").stdout
    assert isinstance(run(*arguments, "none.1").exception, InvalidInput)


def test_the_output_may_replace_an_input(folder: Path) -> None:
    patch = made(folder)
    assert run("apply", folder / "old.onnx", patch, "-o", folder / "old.onnx").exit_code == 0
    assert (folder / "old.onnx").read_bytes() == TARGET


def test_a_failure_leaves_the_old_file_and_nothing_else(folder: Path) -> None:
    patch = made(folder)
    (folder / "out.onnx").write_bytes(b"precious")
    before = names(folder)
    damaged = bytearray(patch.read_bytes())
    damaged[-1] ^= 1
    patch.write_bytes(damaged)
    result = run("apply", folder / "old.onnx", patch, "-o", folder / "out.onnx")
    assert isinstance(result.exception, IntegrityFailure)
    assert (folder / "out.onnx").read_bytes() == b"precious"
    assert names(folder) == before


def test_the_wrong_old_file_is_refused(folder: Path) -> None:
    result = run("apply", folder / "new.onnx", made(folder), "-o", folder / "out.onnx")
    assert isinstance(result.exception, IntegrityFailure)
    assert "the base is not" in str(result.exception)
    assert "out.onnx" not in names(folder)


def test_a_missing_file_is_a_usage_error_and_a_missing_folder_is_named(folder: Path) -> None:
    assert run("make", folder / "none.onnx", folder / "new.onnx", "-o", folder / "p").exit_code == 2
    result = run("make", folder / "old.onnx", folder / "new.onnx", "-o", folder / "none" / "p")
    assert isinstance(result.exception, InvalidInput)
    assert result.exception.field == "output"


@pytest.mark.parametrize(
    ("trouble", "told_as"),
    [(OSError(errno.ENOSPC, "full"), StorageFull), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full-disk", "ctrl-c"],
)
def test_what_was_interrupted_leaves_nothing_behind(
    folder: Path, trouble: BaseException, told_as: type[BaseException]
) -> None:
    before = names(folder)
    with pytest.raises(told_as), _new_file(folder / "p.patch") as sink:
        sink(b"half")
        assert names(folder) > before
        raise trouble
    assert names(folder) == before
