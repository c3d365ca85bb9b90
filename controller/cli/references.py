"""Making references at publishing: how the inputs that the publisher gives are distributed, and the answers to them.

Only counts leave this machine: a reference holds no sample (`common.monitoring.reference`).
"""

from collections.abc import Mapping
from pathlib import Path

import click

from common.artifact.onnx_io import OnnxSignature
from common.errors import InvalidInput
from common.monitoring.drift import OBSERVATIONS_MIN
from common.monitoring.making import Tensors, make_reference
from common.monitoring.reference import encode_reference
from controller.cli.reference_run import NO_EXTRAS, Extras, Reference
from controller.cli.samples import Arrays, read_samples
from controller.cli.selftests import outer_signature, signature_of

REFERENCE_SAMPLES_MAX = 10_000
"""They are held in memory, with the answers to them."""


def make_references(
    variants: Mapping[str, Path], samples: Path, folder: Path, extras: Mapping[str, Extras]
) -> dict[str, Path]:
    """The file of a reference for each variant, through its steps, in `folder`. Raises `InvalidInput`."""
    folder.mkdir()
    return {
        name: _reference(name, file, samples, folder / name, extras.get(name, NO_EXTRAS))
        for name, file in variants.items()
    }


def _reference(name: str, file: Path, samples: Path, target: Path, extras: Extras) -> Path:
    signature = outer_signature(signature_of(file, name), extras)
    inputs = read_samples(samples, signature.inputs, "reference", REFERENCE_SAMPLES_MAX)
    if len(inputs) < OBSERVATIONS_MIN:
        fix = f"give at least {OBSERVATIONS_MIN}, better some hundreds: drift is judged by as many"
        raise InvalidInput(f"{len(inputs)} samples say too little", field="reference", fix=fix)
    outputs = [spec.name for spec in signature.outputs]
    answers = Reference(file, extras).run(inputs, outputs).outputs
    reference = make_reference(signature.inputs, signature.outputs, _paired(inputs, answers, signature))
    counted = ", ".join(sorted({feature.tensor for feature in reference.features}))
    click.echo(f"{name}: a reference of {len(inputs)} samples, of {counted}", err=True)
    target.write_bytes(encode_reference(reference))
    return target


def _paired(inputs: Arrays, answers: Arrays, signature: OnnxSignature) -> list[tuple[Tensors, Tensors]]:
    for name, feeds in inputs.items():
        if missing := {spec.name for spec in signature.inputs} - feeds.keys():
            raise InvalidInput(f"{name!r} lacks {sorted(missing)[0]!r}", field="reference", fix="give every input")
    return [(feeds, answers[name]) for name, feeds in inputs.items()]
