"""What a run has measured, kept for the run that goes on after it.

The figures of a pair hold for the code that made them, the tools, and the two files: a digest of all that is their key.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.delta.figures import PairFigures
from benchmarks.delta.pairs import Pair
from benchmarks.delta.peers import Tool
from benchmarks.report import ROOT
from common.artifact.digest import digest_of
from common.artifact.source import digest_of_source
from common.durable import write_file
from common.filesource import FileSource

FOLDER = ROOT / ".demo" / "bench-delta"
CODE = ("common/delta", "benchmarks/delta")


class Kept(msgspec.Struct, frozen=True):
    """The figures of one pair, and what they hold for."""

    key: str
    figures: PairFigures


def recall(pair: Pair, tools: Sequence[Tool]) -> PairFigures | None:
    """The figures of a run before this one, if they still hold."""
    path = _path(pair)
    if os.environ.get("FRESH") or not path.exists():
        return None
    kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    return kept.figures if kept.key == _key(pair, tools) else None


def keep(pair: Pair, tools: Sequence[Tool], figures: PairFigures) -> PairFigures:
    """`figures`, remembered."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_file(_path(pair), msgspec.json.encode(Kept(_key(pair, tools), figures)))
    return figures


def _path(pair: Pair) -> Path:
    return FOLDER / f"{pair.name}.json"


def _key(pair: Pair, tools: Sequence[Tool]) -> str:
    parts = [tool.name for tool in tools]
    for folder in CODE:
        parts += [digest_of(path.read_bytes()) for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (pair.old, pair.new):
        with FileSource(path) as source:
            parts.append(digest_of_source(source))
    return digest_of("\n".join(parts).encode())
