"""What a run has measured, kept for the run that goes on after it.

A figure holds for the two files of its pair, the tool, and the code that drives it: a digest of all that is its key.
Ours hold only while the codec stays as it is, too. The one peer whose speed is compared with ours is measured again
whenever ours is, so that both figures of a ratio are of one run.
"""

import os
from pathlib import Path

import msgspec

from benchmarks.delta.figures import OURS, OURS_ZSTD_ONLY, XDELTA3, Outcome
from benchmarks.delta.pairs import Pair
from benchmarks.delta.peers import Tool
from benchmarks.report import ROOT
from common.artifact.digest import digest_of
from common.artifact.source import digest_of_source
from common.durable import write_file
from common.filesource import FileSource

FOLDER = ROOT / ".demo" / "bench-delta"
DRIVERS = ("benchmarks/delta/peers.py", "benchmarks/delta/workers.py", "benchmarks/delta/launched.py")
READERS = ("digest", "protobuf", "source", "weights")
"""What the codec uses of `common.artifact`, but for the two fields of a reference."""
OF_THE_CODEC = (OURS, OURS_ZSTD_ONLY, XDELTA3)


class Kept(msgspec.Struct, frozen=True):
    """What one tool did on one pair, and what that holds for."""

    key: str
    outcome: Outcome


def recall(pair: Pair, tool: Tool) -> Outcome | None:
    """What a run before this one has measured, if it still holds."""
    path = _path(pair, tool)
    if os.environ.get("FRESH") or not path.exists():
        return None
    kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    return kept.outcome if kept.key == _key(pair, tool) else None


def keep(pair: Pair, tool: Tool, outcome: Outcome) -> Outcome:
    """`outcome`, remembered."""
    path = _path(pair, tool)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, msgspec.json.encode(Kept(_key(pair, tool), outcome)))
    return outcome


def _path(pair: Pair, tool: Tool) -> Path:
    return FOLDER / pair.name / f"{tool.name.replace(' ', '_')}.json"


def _key(pair: Pair, tool: Tool) -> str:
    code = [ROOT / path for path in DRIVERS]
    if tool.name in OF_THE_CODEC:
        code += [ROOT / "common/artifact" / f"{reader}.py" for reader in READERS]
        code += sorted((ROOT / "common/delta").rglob("*.py"))
    parts = [tool.name, *(digest_of(path.read_bytes()) for path in code)]
    for path in (pair.old, pair.new):
        with FileSource(path) as source:
            parts.append(digest_of_source(source))
    return digest_of("\n".join(parts).encode())
