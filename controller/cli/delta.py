"""`ferry delta`: make, apply and inspect patches between files on this machine. Talks to no controller.

A result appears under its name only when it is complete and on the disk; a failure or Ctrl-C leaves nothing behind.
Reports and progress go to stderr, what `inspect` finds to stdout.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from common.artifact.manifest import ArtifactRef
from common.durable import replacing
from common.errors import InvalidInput
from common.filesource import FileSource
from controller.cli.output import Output, table

if TYPE_CHECKING:
    from common.artifact.weights import Weight
    from common.delta import PatchSummary, TensorTotals

INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)

Report = Callable[[int, int], object]


@click.group("delta", short_help="Make, apply and inspect patches between files.")
def delta() -> None:
    """Make, apply and inspect patches between files on this machine."""


@delta.command("make", short_help="Write a patch that turns OLD into NEW.")
@click.argument("old", type=INPUT)
@click.argument("new", type=INPUT)
@click.option("-o", "--output", "patch", type=OUTPUT, required=True, metavar="PATCH", help="Where to write the patch.")
@click.option("--codec", metavar="NAME", help="tensor-pco.1 (default), or tensor-zstd.1 for devices without pcodec.")
@click.option("--old-model", type=INPUT, metavar="FILE", help="OLD holds the external data of this ONNX model.")
@click.option("--new-model", type=INPUT, metavar="FILE", help="NEW holds the external data of this ONNX model.")
def make(  # noqa: PLR0917 - one parameter for each option
    old: Path, new: Path, patch: Path, codec: str | None, old_model: Path | None, new_model: Path | None
) -> None:
    """Write a patch that turns OLD into NEW.

    A device that has OLD rebuilds NEW from the patch, bit for bit.
    """
    from concurrent.futures import ThreadPoolExecutor

    # The matrices are small: threads of numpy's matrix library, read when it is loaded, would only get in the way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from common import delta as codecs

    with (
        FileSource(old) as base,
        FileSource(new) as target,
        ThreadPoolExecutor(thread_name_prefix="blocks") as pool,
        _progress("making the patch") as report,
        _new_file(patch) as sink,
    ):
        made = codecs.make(
            base,
            target,
            sink,
            codec=codec or codecs.CODECS[0],
            base_weights=_weights(base, old, old_model, "old-model"),
            target_weights=_weights(target, new, new_model, "new-model"),
            progress=report,
            each=pool.map,
        )
    click.echo(f"{patch}: {made.patch_bytes} bytes{_share(made.patch_bytes, made.target.size)}", err=True)


@delta.command("apply", short_help="Rebuild the new file from OLD and PATCH.")
@click.argument("old", type=INPUT)
@click.argument("patch", type=INPUT)
@click.option("-o", "--output", "new", type=OUTPUT, required=True, metavar="NEW", help="Where to write the new file.")
@click.option("--target", metavar="DIGEST", help="The SHA-256 that the new file must have (sha256:...).")
def apply(old: Path, patch: Path, new: Path, target: str | None) -> None:
    """Rebuild the new file from OLD and PATCH.

    It is checked against the first 8 bytes of a SHA-256 that PATCH names: enough to notice a mistake, not to trust
    whoever made the patch. Give --target to be sure, as a device does.
    """
    from common import delta as codecs

    with FileSource(old) as base, FileSource(patch) as source, _progress("applying the patch") as report:
        size = codecs.inspect(source).target_bytes
        expected = None if target is None else _reference(target, size)
        with _new_file(new) as sink:
            made = codecs.apply(base, source, _counting(sink, size, report), target=expected)
    click.echo(f"{new}: {made.size} bytes, {made.digest}", err=True)


@delta.command("inspect", short_help="Show what PATCH is for and made of.")
@click.argument("patch", type=INPUT)
@click.option("--model", type=INPUT, metavar="NEW", help="The new file: also show what was done for each tensor.")
@click.option("--data", metavar="NAME", help="PATCH makes this external data file of the ONNX model NEW.")
@click.option("-o", "--output", "form", type=click.Choice(["table", "json", "yaml"]), default="table")
def inspect(patch: Path, model: Path | None, data: str | None, form: str) -> None:
    """Show which file PATCH starts from, which it makes, and out of what. Its bytes are proven only by applying it."""
    from common import delta as codecs

    with FileSource(patch) as source:
        summary = codecs.inspect(source, () if model is None else _tensors(model, source, data))
    output = Output(form)
    if output.is_table:
        _print_tables(summary)
    else:
        output.document(summary)


def _print_tables(summary: "PatchSummary") -> None:
    head = {
        "codec": summary.codec,
        "base": f"sha256:{summary.base}…  {summary.base_bytes} bytes",
        "target": f"sha256:{summary.target}…  {summary.target_bytes} bytes",
        "patch": f"{summary.patch_bytes} bytes{_share(summary.patch_bytes, summary.target_bytes)}",
    }
    click.echo(table([[name, value] for name, value in head.items()]))
    rows = [[kind.kind, str(kind.count), str(kind.output_bytes), str(kind.patch_bytes)] for kind in summary.operations]
    click.echo("\n" + table([["OPERATION", "COUNT", "BYTES OF THE TARGET", "BYTES IN THE PATCH"], *rows]))
    if summary.tensors:
        tensors = [[one.name, _type(one), _ways(one), str(one.patch_bytes)] for one in summary.tensors]
        click.echo("\n" + table([["TENSOR", "TYPE", "HOW", "BYTES IN THE PATCH"], *tensors]))


def _type(tensor: "TensorTotals") -> str:
    return f"{tensor.dtype.lower()}[{','.join(map(str, tensor.shape))}]"


def _ways(tensor: "TensorTotals") -> str:
    """The kinds of operation that write a tensor, the one that writes most first, with its share if there are more."""
    whole = sum(tensor.output_bytes.values())
    ways = sorted(tensor.output_bytes.items(), key=lambda way: -way[1])
    return ", ".join(kind if len(ways) == 1 else f"{kind} {100 * length / whole:.0f} %" for kind, length in ways)


def _weights(source: FileSource, path: Path, model: Path | None, field: str) -> "tuple[Weight, ...] | None":
    """The tensors in the data file at `path` as `model` describes it; None if the file describes itself."""
    if model is None:
        return None
    from common.artifact.weights import external_weights

    with FileSource(model) as description:
        found = external_weights(description, path.name, source.size)
    if not found:
        fix = f"name the model that refers to {path.name!r}, and do not rename its data file"
        raise InvalidInput(f"{model} keeps no weights in {path.name!r}", field=field, fix=fix)
    return found


def _tensors(model: Path, patch: FileSource, data: str | None) -> "tuple[Weight, ...]":
    from common import delta as codecs
    from common.artifact.weights import external_weights, weights

    with FileSource(model) as source:
        if data is not None:
            return external_weights(source, data, codecs.inspect(patch).target_bytes)
        return weights(source)


def _reference(digest: str, size: int) -> ArtifactRef:
    try:
        return msgspec.convert({"digest": digest, "size": size}, ArtifactRef)
    except msgspec.ValidationError as error:
        fix = "give sha256: and 64 hex digits"
        raise InvalidInput(f"{digest!r} is not a digest", field="target", fix=fix) from error


def _share(patch_bytes: int, size: int) -> str:
    return f", {100 * patch_bytes / size:.3g} % of the new file's {size}" if size else ""


def _counting(sink: Callable[[bytes], object], total: int, report: Report | None) -> Callable[[bytes], object]:
    """`sink`, reporting how many of `total` bytes went through."""
    if report is None:
        return sink
    done = 0

    def count(data: bytes) -> None:
        nonlocal done
        sink(data)
        done += len(data)
        report(done, total)

    return count


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Report | None]:
    """A progress bar on stderr; None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A sink whose bytes become the file `path` when the block ends well, and are gone otherwise."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(replacing(path))
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            fix = "name a folder that exists and that you may write to"
            raise InvalidInput(f"cannot write {path}: {error.strerror}", field="output", fix=fix) from error
        yield file.write
