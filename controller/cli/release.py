"""`ferry release`: publish models, look at them, compare two."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.artifact.selftest import describe_rule
from common.errors import InvalidInput
from common.ids import ReleaseRef
from controller.cli.connection import connected
from controller.cli.output import Output, size, table, when
from controller.cli.serving_file import parse_serving
from controller.cli.values import duration, parse_variants

if TYPE_CHECKING:
    from controller.cli.reference_run import Extras
    from controller.client import FerryClient, Progress, SelfTestDraft
    from controller.resources import ReleaseView

GARBAGE_AGE = "1h"
STATS_SINCE = "1h"


_ARRAYS = click.Path(exists=True, path_type=Path)


@click.group("release")
def release() -> None:
    """Publish, list, show and compare releases."""


@release.command("publish")
@click.argument("name", metavar="NAME@VERSION")
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--variant", "variants", multiple=True, metavar="NAME=FILE", help="A build for a kind of device.")
@click.option("--samples", metavar="PATH|auto[:N]", help="Inputs of a self-test: .npz, a folder of them, or made up.")
@click.option("--expected", type=_ARRAYS, metavar="PATH", help="Outputs to expect instead of a reference run's.")
@click.option(
    "--tolerance", "tolerances", multiple=True, metavar="PARTS", help="E.g. output=scores,rtol=1e-3,atol=1e-4."
)
@click.option("--latency-max", "latencies", multiple=True, metavar="[VARIANT=]SECONDS", help="Bound for each sample.")
@click.option("--pipeline", "pipelines", multiple=True, metavar="[VARIANT=]FILE", help="Steps around the model, TOML.")
@click.option("--custom-ops", multiple=True, metavar="[VARIANT=]FILE", help="A shared library with operators (.so).")
@click.option(
    "--serving", multiple=True, metavar="[VARIANT=]FILE", help="How it is served: answers kept, rules, padding."
)
@click.option("--reference", type=_ARRAYS, metavar="PATH", help="Usual inputs, .npz: devices look for drift from them.")
@connected
def publish(
    ferry: "FerryClient",
    output: Output,
    *,
    name: str,
    file: Path | None,
    variants: tuple[str, ...],
    samples: str | None,
    expected: Path | None,
    tolerances: tuple[str, ...],
    latencies: tuple[str, ...],
    pipelines: tuple[str, ...],
    custom_ops: tuple[str, ...],
    serving: tuple[str, ...],
    reference: Path | None,
) -> None:
    """Upload FILE (the variant `default`) and publish it as NAME@VERSION, for good.

    Files beside it that it keeps weights in (external data) are found and belong to the release. With --samples every
    variant is run on them here, and devices must come to the same answers before they use it. --tolerance takes rtol=X,
    atol=X, exact or top1, and output=NAME and variant=NAME to say where it holds. With --pipeline callers see what goes
    into the first step and what comes out of the last; the plug-ins must be installed here. --serving names a TOML file
    that says how devices serve the release; it is signed with it. With --reference every variant is run on those inputs
    here too, and devices count how much what they see differs from them.
    """
    ref, files = ReleaseRef.parse(name), parse_variants(file, variants)
    terms = parse_serving(serving, files)
    with tempfile.TemporaryDirectory(prefix="ferry-samples-") as folder, _upload_progress(str(ref)) as progress:
        extras = _extras(files, pipelines, custom_ops)
        tests = Path(folder) / "self-tests"
        drafts = _self_tests(
            files, tests, extras, samples=samples, expected=expected, tolerances=tolerances, latencies=latencies
        )
        view, created = ferry.publish(
            ref.model,
            ref.version,
            files,
            progress,
            drafts,
            pipelines={name: one.pipeline.given for name, one in extras.items() if one.pipeline},
            custom_ops={name: one.libraries for name, one in extras.items() if one.libraries},
            serving=terms,
            references=_references(files, Path(folder) / "references", reference, extras),
        )
    click.echo(f"{ref} {'is published' if created else 'was published before, with the same bytes'}", err=True)
    output.item(view, _COLUMNS, lambda one: one.name)


@release.command("list")
@click.option("--model", metavar="NAME", help="Only this model.")
@connected
def list_(ferry: "FerryClient", output: Output, model: str | None) -> None:
    """List releases."""
    output.items(ferry.releases(model), _COLUMNS, lambda one: one.name)


@release.command("show")
@click.argument("name", metavar="NAME@VERSION")
@connected
def show(ferry: "FerryClient", output: Output, name: str) -> None:
    """Show a release: its files, its inputs and outputs, its self-tests."""
    view = ferry.release(ReleaseRef.parse(name))
    output.item(view, _COLUMNS, lambda one: one.name)
    if output.is_table:
        click.echo("\n" + table(_file_rows(view)))
        click.echo("\n" + table(_tensor_rows(view)))
        if steps := _step_rows(view):
            click.echo("\n" + table(steps))
        tests = _test_rows(view)
        click.echo("\n" + (table(tests) if tests else "no self-test"))
        if serving := _serving_rows(view):
            click.echo("\n" + table(serving))


@release.command("stats")
@click.argument("name", metavar="NAME@VERSION")
@click.option("--since", type=duration, default=STATS_SINCE, show_default=True, help="How far back to look.")
@click.option("--device", metavar="ID", help="Only what this device measured.")
@connected
def stats(ferry: "FerryClient", output: Output, name: str, since: float, device: str | None) -> None:
    """Sum up what devices measured of a release.

    Requests, errors, latency, waiting, engine runs, resource use; accuracy where applications report labels; drift
    where the release carries a reference (publish --reference); how fast its variants are where devices leave the
    choice to measurement.
    """
    from controller.cli.measured import STATS, drift_rows, variant_rows

    view = ferry.telemetry(ReleaseRef.parse(name), since, device)
    output.item(view, STATS, lambda one: one.name)
    if output.is_table and view.drift:
        click.echo("\n" + table(drift_rows(view)))
    if output.is_table and view.variants:
        click.echo("\n" + table(variant_rows(view)))


@release.command("diff")
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@connected
def diff(ferry: "FerryClient", output: Output, old: str, new: str) -> None:
    """Compare release OLD with release NEW: files, sizes, tensors, terms of serving, and patches between them."""
    from controller.cli.comparison import compare, comparison_rows, serving_rows, tensor_rows

    before, after = (ferry.release(ReleaseRef.parse(name)) for name in (old, new))
    targets = {file.digest for variant in after.manifest.variants.values() for file in variant.files.values()}
    patches = [patch for target in sorted(targets) for patch in ferry.patches(target)]
    comparison = compare(before, after, patches)
    if not output.is_table:
        output.document(comparison)
        return
    click.echo(table(comparison_rows(comparison)))
    changes = tensor_rows(comparison)
    click.echo("\n" + (table(changes) if changes else "inputs and outputs are the same"))
    if terms := serving_rows(comparison):
        click.echo("\n" + table(terms))


@release.command("gc")
@click.option("--min-age", type=duration, default=GARBAGE_AGE, show_default=True, help="Leave younger blobs alone.")
@connected
def collect(ferry: "FerryClient", output: Output, min_age: float) -> None:
    """Remove files that no release and no patch needs."""
    collected = ferry.collect_garbage(min_age)
    columns = {"REMOVED": lambda one: str(one.count), "BYTES": lambda one: size(one.bytes)}
    output.item(collected, columns, lambda one: str(one.count))


_COLUMNS = {
    "RELEASE": lambda one: one.name,
    "VARIANTS": lambda one: ",".join(one.manifest.variants),
    "SIZE": lambda one: ",".join(size(variant.size) for variant in one.manifest.variants.values()),
    "PUBLISHED": lambda one: when(one.published_at),
    "BY": lambda one: one.published_by,
}


def _file_rows(view: "ReleaseView") -> list[list[str]]:
    rows = [["VARIANT", "FILE", "SIZE", "DIGEST"]]
    for name, variant in view.manifest.variants.items():
        for file in (variant.model, *sorted(variant.files.keys() - {variant.model})):
            rows.append([name, file, size(variant.files[file].size), variant.files[file].digest])
    return rows


def _tensor_rows(view: "ReleaseView") -> list[list[str]]:
    rows = [["VARIANT", "TENSOR", "TYPE", "SHAPE"]]
    for name, variant in view.manifest.variants.items():
        for kind, tensors in (("in", variant.inputs), ("out", variant.outputs)):
            rows += [[name, f"{kind} {one.name}", one.datatype, str(list(one.shape))] for one in tensors]
    return rows


def _step_rows(view: "ReleaseView") -> list[list[str]]:
    """The steps around the models and the libraries with operators; empty when there are none."""
    rows = []
    for name, variant in view.manifest.variants.items():
        pipeline = variant.pipeline
        for where, steps in (("before", pipeline.before), ("after", pipeline.after)) if pipeline else ():
            rows += [[name, where, f"{one.plugin} {one.version}", ", ".join(one.code) or "-"] for one in steps]
        rows += [[name, "operators", library, variant.files[library].digest] for library in variant.custom_ops]
    return [["VARIANT", "PART", "CODE", "DIGEST"], *rows] if rows else []


def _test_rows(view: "ReleaseView") -> list[list[str]]:
    """The outputs that devices compare; empty when there are none."""
    rows = []
    for name, variant in view.manifest.variants.items():
        if test := variant.self_test:
            bound = f"{test.latency_max_s:g} s" if test.latency_max_s is not None else "-"
            rows += [[name, str(test.count), output, describe_rule(rule), bound] for output, rule in test.rules.items()]
    return [["VARIANT", "SAMPLES", "OUTPUT", "TOLERANCE", "LATENCY"], *rows] if rows else []


def _extras(files: dict[str, Path], pipelines: tuple[str, ...], custom_ops: tuple[str, ...]) -> "dict[str, Extras]":
    """Steps and libraries by variant; nothing is imported for those who have none."""
    if not pipelines and not custom_ops:
        return {}
    from controller.cli.pipelines import files_by_variant, open_pipeline, read_pipeline
    from controller.cli.reference_run import Extras
    from controller.cli.selftests import signature_of

    libraries, extras = files_by_variant(custom_ops, files, "custom-ops"), {}
    given = files_by_variant(pipelines, files, "pipeline")
    for name, file in files.items():
        draft = None
        if of_variant := given.get(name):
            if len(of_variant) > 1:
                raise InvalidInput(f"{name} has {len(of_variant)}", field="pipeline", fix="give each variant one")
            signature = signature_of(file, name)
            draft = open_pipeline(read_pipeline(of_variant[0]), signature.inputs, signature.outputs)
        extras[name] = Extras(draft, libraries.get(name, ()))
    return extras


def _serving_rows(view: "ReleaseView") -> list[list[str]]:
    """How the variants want to be served; empty when none says anything."""
    from controller.cli.comparison import serving_in_words

    rows = [
        [name, term, words]
        for name, variant in view.manifest.variants.items()
        for term, words in serving_in_words(variant.serving).items()
    ]
    return [["VARIANT", "SERVING", ""], *rows] if rows else []


def _self_tests(
    files: dict[str, Path],
    folder: Path,
    extras: "dict[str, Extras]",
    *,
    samples: str | None,
    expected: Path | None,
    tolerances: tuple[str, ...],
    latencies: tuple[str, ...],
) -> "dict[str, SelfTestDraft]":
    if samples is None:
        if expected or tolerances or latencies:
            fix = "give --samples too, or leave --expected, --tolerance and --latency-max out"
            raise InvalidInput("there are none to test with", field="samples", fix=fix)
        return {}
    from controller.cli.selftests import Wishes, make_drafts
    from controller.cli.tolerances import parse_latencies, parse_tolerance

    wishes = Wishes(
        samples=samples,
        expected=expected,
        tolerances=tuple(map(parse_tolerance, tolerances)),
        latencies=parse_latencies(latencies, files),
    )
    folder.mkdir()
    return make_drafts(files, wishes, folder, extras)


def _references(
    files: dict[str, Path], folder: Path, samples: Path | None, extras: "dict[str, Extras]"
) -> dict[str, Path]:
    if samples is None:
        return {}
    from controller.cli.references import make_references

    return make_references(files, samples, folder, extras)


@contextlib.contextmanager
def _upload_progress(title: str) -> Iterator["Progress | None"]:
    """A bar on a terminal's stderr, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)
    )
    with bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
