"""A release's self-test on this device: its samples through the loaded session, before anybody else may ask it.

An answer that breaks its rule is the end of the release here (`SelfTestFailed`). Time is only measured, if the release
names a bound: the best of up to `LATENCY_RUNS` runs of a sample is what the release needs, the rest is what else the
device did meanwhile, so runs stop at the first that keeps the bound. What a slow release means is for others to say.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.artifact import TensorSpec
from common.artifact.answers import check_samples, first_difference
from common.artifact.samples import SAMPLES_BYTES_MAX, Sample, decode_samples
from common.artifact.selftest import SelfTest
from common.artifact.tensors import Array
from common.errors import IntegrityFailure, InvalidInput, NotFound
from edge_agent.inference.engine import EngineFailure, Session
from edge_agent.inference.trial import ModelRejected

LATENCY_RUNS = 5
"""A sample that keeps no bound is run this often, for its best time."""


class SelfTestFailed(ModelRejected):
    """The release answers its own samples otherwise on this device than it did for its publisher."""

    code = "self_test_failed"


class SamplesFile(NamedTuple):
    """Where a release's samples lie, and the terms on which they are judged."""

    path: Path
    terms: SelfTest


class Tested(NamedTuple):
    """A self-test whose answers were right. `latency_s` is the best time of the slowest sample, which has `name`; None
    when the release names no bound.
    """

    samples: int
    name: str = ""
    latency_s: float | None = None
    latency_max_s: float | None = None

    @property
    def slowness(self) -> str:
        """In words by how much the bound was missed; empty when it was kept or there is none."""
        if self.latency_s is None or self.latency_max_s is None or self.latency_s <= self.latency_max_s:
            return ""
        return (
            f"sample {self.name!r} took {self.latency_s:.3g} s at best of {LATENCY_RUNS} runs, "
            f"allowed are {self.latency_max_s:g} s"
        )


def read_samples(
    file: SamplesFile, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> tuple[Sample, ...]:
    """At least one. Raises `SelfTestFailed` for samples of another model, and `NotFound` (there is no such file)."""
    try:
        with file.path.open("rb") as source:
            data = source.read(SAMPLES_BYTES_MAX + 1)
        samples = decode_samples(data)
        check_samples(samples, file.terms, inputs, outputs)
    except FileNotFoundError as error:
        raise NotFound(f"no samples at {file.path}") from error
    except (IntegrityFailure, InvalidInput) as error:
        raise SelfTestFailed(f"the samples are of no use: {error}") from error
    return samples


def check_answers(session: Session, samples: tuple[Sample, ...], terms: SelfTest) -> None:
    """Run every sample once and compare. Raises `SelfTestFailed` and `Unavailable` (no memory; it says nothing)."""
    for sample in samples:
        if difference := first_difference(terms.rules, sample, _answers(session, sample, terms)):
            raise SelfTestFailed(difference)


def measure(session: Session, samples: tuple[Sample, ...], terms: SelfTest, elapsed: Callable[[], float]) -> Tested:
    """How long the samples take, if there is a bound; `elapsed` reads a steady clock, in seconds."""
    if terms.latency_max_s is None:
        return Tested(len(samples))
    times = {sample.name: _best_time(session, sample, terms, elapsed) for sample in samples}
    slowest = max(times, key=times.__getitem__)
    return Tested(len(samples), slowest, times[slowest], terms.latency_max_s)


def _best_time(session: Session, sample: Sample, terms: SelfTest, elapsed: Callable[[], float]) -> float:
    best = float("inf")
    for _ in range(LATENCY_RUNS):
        started_at = elapsed()
        _answers(session, sample, terms)
        best = min(best, elapsed() - started_at)
        if terms.latency_max_s is not None and best <= terms.latency_max_s:
            break
    return best


def _answers(session: Session, sample: Sample, terms: SelfTest) -> dict[str, Array]:
    try:
        return session.run(sample.inputs, list(terms.rules))
    except (EngineFailure, InvalidInput) as error:  # the second is what a step says of an input
        raise SelfTestFailed(f"sample {sample.name!r}: {error.message}") from error
