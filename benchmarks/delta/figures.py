"""What a run of the benchmark has measured, as values. Pure."""

from collections.abc import Iterable

import msgspec

OURS, OURS_ZSTD_ONLY = "ours", "ours (zstd only)"
ZSTD_FULL, ZSTD_PATCH = "zstd -19", "zstd --patch-from -19"
XDELTA3, BSDIFF4, HDIFFPATCH, ZIPNN = "xdelta3 -9", "bsdiff4", "HDiffPatch", "ZipNN"
PEERS = (ZSTD_FULL, ZSTD_PATCH, XDELTA3, BSDIFF4, HDIFFPATCH, ZIPNN)


class Cost(msgspec.Struct, frozen=True):
    """CPU seconds, user and system, and peak RSS in MB (2^20 bytes) of the whole process."""

    cpu_s: float
    peak_mb: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One tool on one pair. `problem` is empty unless it failed; the figures are then None."""

    tool: str
    patch_bytes: int | None = None
    create: Cost | None = None
    apply: Cost | None = None
    problem: str = ""


class PairFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of one pair. `bound_bytes` is None where no tensor changed, or some have no partner."""

    name: str
    about: str
    new_bytes: int
    bound_bytes: float | None
    outcomes: tuple[Outcome, ...]

    def of(self, tool: str) -> Outcome | None:
        """What `tool` did; None where it failed or did not run."""
        return next((each for each in self.outcomes if each.tool == tool and not each.problem), None)

    def bytes_of(self, tool: str) -> int | None:
        """The size of the tool's patch, None where it failed or did not run."""
        outcome = self.of(tool)
        return None if outcome is None else outcome.patch_bytes

    def best_of(self, tools: Iterable[str]) -> int | None:
        """The size of the smallest patch that any of `tools` made."""
        return min((size for tool in tools if (size := self.bytes_of(tool)) is not None), default=None)
