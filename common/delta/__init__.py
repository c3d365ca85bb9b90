"""Patches: bytes that rebuild a target file from a base file, bit for bit.

`make` compares the two files and writes a patch, `apply` rebuilds the target on a device that has the base, `inspect`
says what a patch would do. Files come in as `ByteSource`s and go out piece by piece through a sink, so memory stays
bounded however large a model is. Whoever applies a patch knows from a signed order which target it must give; the patch
itself is believed in nothing. The byte layout is in docs/reference/patch-format.md.

A device that only applies loads nothing of what only making needs.
"""

from typing import TYPE_CHECKING

from common.delta.applying import apply
from common.delta.codecs import CODECS
from common.delta.inspecting import OperationTotals, PatchSummary, TensorTotals, inspect

if TYPE_CHECKING:
    from common.delta.making import Made, make

__all__ = ["CODECS", "Made", "OperationTotals", "PatchSummary", "TensorTotals", "apply", "inspect", "make"]


def __getattr__(name: str) -> object:
    if name in {"Made", "make"}:
        from common.delta import making

        return getattr(making, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
