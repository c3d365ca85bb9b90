"""What people type, as values: durations, sizes, labels, phases, `NAME=FILE`. Wrong input is refused by name."""

import re
from collections.abc import Iterable
from pathlib import Path

import click

from common.errors import InvalidInput
from controller.rollouts.model import PhaseSpec

SECONDS_OF = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
BYTES_OF = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]{0,3})")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)(%?)")


def duration(text: str) -> float:
    """Seconds, from a number with s, m, h, d or nothing behind it; a click type."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a duration; write for example 90s, 10m, 2h or 1d")
    return float(match[1]) * SECONDS_OF[match[2]]


def byte_count(text: str) -> int:
    """Bytes, from a number with kB, MB, GB (powers of 1000), KiB, MiB, GiB or nothing behind it; a click type."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in BYTES_OF:
        raise click.BadParameter(f"{text!r} is not a number of bytes; write for example 200kB, 1.5MB or 64MiB")
    return int(float(match[1]) * BYTES_OF[match[2]])


def fraction(text: str) -> float:
    """A share from 0 to 1, written as 0.1 or as 10%; a click type."""
    match = _NUMBER.fullmatch(text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise click.BadParameter(f"{text!r} is not a share; write for example 0.1 or 10%")
    return value


def parse_labels(texts: Iterable[str], *, removable: bool = False) -> dict[str, str | None]:
    """`site=oslo` sets a label; `site-` removes it where that is allowed."""
    labels: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if equals:
            labels[key] = value
        elif removable and text.endswith("-"):
            labels[text[:-1]] = None
        else:
            ways = "KEY=VALUE, or KEY- to remove it" if removable else "KEY=VALUE"
            raise InvalidInput(f"{text!r} is not a label", field="label", fix=f"write {ways}")
    return labels


def parse_phases(text: str) -> tuple[PhaseSpec, ...]:
    """`1%,10%,50%,100%`, with plain numbers for counts of devices. Whether they widen is the controller's to judge."""
    return tuple(_phase(part.strip(), index) for index, part in enumerate(text.split(",")))


def parse_variants(file: Path | None, named: Iterable[str]) -> dict[str, Path]:
    """The default file and `NAME=FILE` pairs, as variants."""
    variants: dict[str, Path] = {"default": file} if file else {}
    for text in named:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise InvalidInput(f"{text!r} is not a variant", field="variant", fix="write NAME=FILE, e.g. int8=m8.onnx")
        if name in variants:
            raise InvalidInput(f"{name!r} is given twice", field="variant", fix="give each variant one file")
        variants[name] = Path(path)
    if not variants:
        raise InvalidInput("there is no file", field="FILE", fix="name an ONNX file, or use --variant NAME=FILE")
    return variants


def _phase(text: str, index: int) -> PhaseSpec:
    match = _NUMBER.fullmatch(text)
    if match is None or (not match[2] and "." in match[1]):
        fix = "write percentages or counts, e.g. 1%,10%,100%; phases by selector go into a file (-f)"
        raise InvalidInput(f"{text!r} is not a phase", field=f"phases[{index}]", fix=fix)
    return PhaseSpec(percent=float(match[1])) if match[2] else PhaseSpec(count=int(match[1]))
