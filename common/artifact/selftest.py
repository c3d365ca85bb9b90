"""The terms of a self-test: which of a variant's files holds the samples, and how near a device must come to them.

They are part of the manifest, so they are signed, and the digest of the samples with them. What a rule means in numbers
is in `common.artifact.answers`, how samples are written in `common.artifact.samples`.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

SAMPLES_MAX = 32
"""Samples of one self-test. It shows that a release runs as it did for its publisher; it is no evaluation."""
SAMPLES_FILE = "selftest.safetensors"
"""The name of the samples among a variant's files."""
LATENCY_S_MAX = 3600.0
RULES_MAX = 64
"""Outputs that a self-test compares."""

Bound = Annotated[float, Meta(ge=0)]


class Exact(msgspec.Struct, frozen=True, tag_field="rule", tag="exact"):
    """Every element is equal."""


class Close(msgspec.Struct, frozen=True, tag_field="rule", tag="close"):
    """Every element is finite and |found - expected| <= atol + rtol * |expected|, computed in FP64."""

    rtol: Bound
    atol: Bound


class Top1(msgspec.Struct, frozen=True, tag_field="rule", tag="top1"):
    """Along the last axis, some largest element of the expected ones is a largest one of those found."""


Rule = Exact | Close | Top1


class SelfTest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`samples` is a file of the variant with `count` samples, `rules` has one for each output that is compared.

    `latency_max_s` bounds the best of a few runs of each sample, on the device, in seconds.
    """

    samples: str
    count: Annotated[int, Meta(ge=1, le=SAMPLES_MAX)]
    rules: Annotated[dict[str, Rule], Meta(min_length=1, max_length=RULES_MAX)]
    latency_max_s: Annotated[float, Meta(gt=0, le=LATENCY_S_MAX)] | None = None


def describe_rule(rule: Rule) -> str:
    """A rule for people, as it is given on the command line where that is possible."""
    match rule:
        case Exact():
            return "exact"
        case Close(rtol, atol):
            return f"rtol={rtol:g},atol={atol:g}"
        case Top1():
            return "top1"
