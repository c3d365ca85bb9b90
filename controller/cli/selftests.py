"""Making self-tests at publishing: inputs from the publisher, expected outputs from a reference run of each variant.

The run is made again in the same session, and once more without the runtime's optimisations of the graph, which
computes the same by other kernels. If these answers differ by more than the rules allow here, they will on some device,
and the publisher is told so before anything is uploaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
import numpy as np
from msgspec.structs import replace

from common.artifact import TensorSpec
from common.artifact.answers import check_samples, first_difference
from common.artifact.onnx_io import OnnxSignature, read_signature
from common.artifact.samples import Sample, encode_samples
from common.artifact.selftest import SAMPLES_FILE, Rule, SelfTest
from common.artifact.tensors import Array
from common.errors import InvalidInput
from common.filesource import FileSource
from controller.cli.reference_run import NO_EXTRAS, Extras, Reference
from controller.cli.samples import AUTO_SAMPLES, Arrays, made_up, read_samples
from controller.cli.tolerances import Tolerance, check_names, rule_for
from controller.client import SelfTestDraft

AUTO = "auto"


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What the publisher says of the self-tests: `samples` is a path, `auto` or `auto:N`; latencies are by variant."""

    samples: str
    expected: Path | None = None
    tolerances: tuple[Tolerance, ...] = ()
    latencies: Mapping[str, float] = {}


def make_drafts(
    variants: Mapping[str, Path], wishes: Wishes, folder: Path, extras: Mapping[str, Extras]
) -> dict[str, SelfTestDraft]:
    """A self-test for each variant, through its steps, with its samples written to `folder`. Raises `InvalidInput`."""
    signatures = {name: outer_signature(signature_of(file, name), extras.get(name)) for name, file in variants.items()}
    outputs = {name: tuple(spec.name for spec in one.outputs) for name, one in signatures.items()}
    check_names(wishes.tolerances, outputs)
    builds = {name: _Build(name, file, extras.get(name, NO_EXTRAS)) for name, file in variants.items()}
    return {name: _draft(builds[name], one, wishes, folder) for name, one in signatures.items()}


class _Build(NamedTuple):
    """A variant: its name, its ONNX file and what it has besides."""

    name: str
    file: Path
    extras: Extras


def outer_signature(signature: OnnxSignature, extras: Extras | None) -> OnnxSignature:
    """What callers see: the tensors outside of the steps."""
    if extras is None or extras.pipeline is None:
        return signature
    given = extras.pipeline.given
    return replace(signature, inputs=given.inputs, outputs=given.outputs)


def _draft(build: _Build, signature: OnnxSignature, wishes: Wishes, folder: Path) -> SelfTestDraft:
    name, file, extras = build
    inputs = _inputs(wishes.samples, signature.inputs)
    given = read_samples(wishes.expected, signature.outputs, "expected") if wishes.expected else None
    outputs = _outputs(given, signature, inputs)
    reference = Reference(file, extras)
    run = reference.run(inputs, outputs)
    expected = given or run.outputs
    specs = {spec.name: spec for spec in signature.outputs}
    rules = {
        output: rule_for(wishes.tolerances, name, specs[output], _largest(expected, specs[output]))
        for output in outputs
    }
    samples = tuple(Sample(sample, feeds, expected[sample]) for sample, feeds in inputs.items())
    test = SelfTest(samples=SAMPLES_FILE, count=len(samples), rules=rules)
    check_samples(samples, test, signature.inputs, signature.outputs)
    _check_here(name, rules, samples, run.outputs, "the answers are not the expected ones")
    again, plain = (one.run(inputs, outputs) for one in (reference, Reference(file, extras, optimised=False)))
    _check_here(name, rules, samples, again.outputs, "it answers the same input in another way the next time")
    _check_here(name, rules, samples, plain.outputs, "the answers depend on how the graph is optimised")
    click.echo(f"{name}: {len(samples)} samples, the slowest took {run.slowest_s:.3g} s on this machine", err=True)
    return SelfTestDraft(_written(samples, folder / name), rules, wishes.latencies.get(name))


def _check_here(variant: str, rules: Mapping[str, Rule], samples: tuple[Sample, ...], found: Arrays, what: str) -> None:
    for sample in samples:
        if difference := first_difference(rules, sample, found[sample.name]):
            fix = f"allow for it, for example --tolerance variant={variant},rtol=0.05,atol=0.05 (or top1)"
            raise InvalidInput(f"{what}: {difference}", field=f"variants.{variant}", fix=fix)


def _inputs(samples: str, specs: tuple[TensorSpec, ...]) -> Arrays:
    word, colon, count = samples.partition(":")
    if word != AUTO:
        return read_samples(Path(samples), specs, "samples")
    if colon and not count.isdecimal():
        raise InvalidInput(f"{count!r} is not a number", field="samples", fix="write auto, or for example auto:8")
    return made_up(specs, int(count) if colon else AUTO_SAMPLES)


def _outputs(given: Arrays | None, signature: OnnxSignature, inputs: Arrays) -> tuple[str, ...]:
    """The outputs that are compared: all, or those that the publisher gives."""
    if given is None:
        return tuple(spec.name for spec in signature.outputs)
    if given.keys() != inputs.keys():
        fix = "give the expected outputs of exactly the samples"
        raise InvalidInput(f"there are {len(given)}, and {len(inputs)} samples", field="expected", fix=fix)
    named = {frozenset(one) for one in given.values()}
    if len(named) > 1:
        raise InvalidInput("not the same outputs for every sample", field="expected", fix="give the same for each")
    return tuple(sorted(named.pop()))


def _largest(expected: Arrays, spec: TensorSpec) -> float:
    arrays: list[Array] = [one[spec.name] for one in expected.values() if one[spec.name].dtype.kind == "f"]
    finite = (array[np.isfinite(array)].astype(np.float64) for array in arrays)
    return max((float(np.abs(array).max()) for array in finite if array.size), default=0.0)


def signature_of(file: Path, variant: str) -> OnnxSignature:
    """What the ONNX file of a variant takes and answers; `InvalidInput`."""
    try:
        with FileSource(file) as source:
            return read_signature(source)
    except InvalidInput as error:
        raise InvalidInput(error.message, field=f"variants.{variant}.{file.name}", fix=error.fix) from error
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror}", field=f"variants.{variant}") from error


def _written(samples: tuple[Sample, ...], folder: Path) -> Path:
    folder.mkdir()
    path = folder / SAMPLES_FILE
    path.write_bytes(encode_samples(samples))
    return path
