"""Patches: bytes that rebuild a target file from a base file, bit for bit.

`make` compares the two files and writes a patch, `apply` rebuilds the target on a device that has the base, `inspect`
says what a patch would do. Files come in as `ByteSource`s and go out piece by piece through a sink, so memory stays
bounded however large a model is. Whoever applies a patch knows from a signed order which target it must give; the patch
itself is believed in nothing. The byte layout is in docs/reference/patch-format.md.
"""

from common.delta.applying import apply, inspect
from common.delta.layout import CODEC, OperationTotals, PatchSummary
from common.delta.making import make

CODECS: tuple[str, ...] = (CODEC,)
"""The codecs whose patches this build can apply, best first."""

__all__ = ["CODECS", "OperationTotals", "PatchSummary", "apply", "inspect", "make"]
