"""Applying a patch, and saying what one would do. Both believe nothing that the patch says."""

from collections.abc import Callable

from common.artifact.digest import Hasher
from common.artifact.manifest import ArtifactRef
from common.artifact.source import ByteSource, digest_of_source, pieces
from common.delta.layout import (
    CODEC,
    Block,
    OperationTotals,
    PatchSummary,
    read_blocks,
    read_header,
    read_literals,
)
from common.errors import IntegrityFailure


def apply(base: ByteSource, patch: ByteSource, sink: Callable[[bytes], object], *, target: ArtifactRef) -> None:
    """Write the target of `patch` to `sink`, in order, in pieces of at most 1 MiB.

    `IntegrityFailure` when the patch is not for `base` and `target`, is damaged, or gives other bytes than `target`
    names. What was written to `sink` before a failure must be thrown away. Needs about 4 MB beside the piece in hand.
    """
    header = read_header(patch)
    if header.target != target:
        raise IntegrityFailure(f"the patch makes {header.target.digest}, expected {target.digest}")
    if base.size != header.base.size or digest_of_source(base) != header.base.digest:
        fix = "use the base that the patch was made from"
        raise IntegrityFailure(f"the base is not {header.base.digest}, from which the patch starts", fix=fix)
    hasher = Hasher()
    for block in read_blocks(patch, header):
        _write(block, read_literals(patch, block), base, _both(hasher.update, sink))
    if hasher.digest() != target.digest:
        raise IntegrityFailure(f"the patch gave other bytes than {target.digest}", fix="fetch it again")


def inspect(patch: ByteSource) -> PatchSummary:
    """What `patch` is for and made of, without the base; `IntegrityFailure` when its structure is damaged.

    The literal bytes themselves are not looked at: only applying a patch proves it.
    """
    header = read_header(patch)
    copies = copied = tables = runs = literals = frames = 0
    goes_on = False
    for block in read_blocks(patch, header):
        literal, length, _ = block.operations
        copies += int((length > 0).sum())
        copied += int(length.sum())
        # A literal that fills a block goes on in the next one, without a copy between: that is one run, not two.
        runs += int((literal > 0).sum()) - (goes_on and bool(literal[0] > 0))
        goes_on = bool(length[-1] == 0)
        literals += block.literal_bytes
        tables += block.operations_frame_bytes
        frames += block.literal_frame_bytes
    return PatchSummary(
        codec=CODEC,
        base=header.base,
        target=header.target,
        patch_bytes=patch.size,
        operations=(
            OperationTotals("copy", copies, copied, tables),
            OperationTotals("literal", runs, literals, frames),
        ),
    )


def _write(block: Block, literals: bytes, base: ByteSource, sink: Callable[[bytes], object]) -> None:
    used = 0
    for literal, length, offset in zip(*(column.tolist() for column in block.operations), strict=True):
        if literal:
            sink(literals[used : used + literal])
            used += literal
        for piece in pieces(base, offset, offset + length):
            sink(piece)


def _both(first: Callable[[bytes], object], second: Callable[[bytes], object]) -> Callable[[bytes], object]:
    def call(data: bytes) -> None:
        first(data)
        second(data)

    return call
