"""Two releases side by side: pure, from what the API says of them."""

from collections.abc import Iterable, Sequence

import msgspec

from common.artifact import ArtifactRef, TensorSpec, Variant
from controller.cli.output import share, size
from controller.resources import PatchView, ReleaseView


class TensorChange(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output that differs; None where it does not exist."""

    kind: str
    name: str
    old: TensorSpec | None
    new: TensorSpec | None


class VariantComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One variant in both releases; None where it does not exist. `patches` lead from the old file to the new."""

    variant: str
    old: ArtifactRef | None
    new: ArtifactRef | None
    identical: bool
    tensors: tuple[TensorChange, ...]
    patches: tuple[PatchView, ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What changed between two releases."""

    old: str
    new: str
    variants: tuple[VariantComparison, ...]


def compare(old: ReleaseView, new: ReleaseView, patches: Iterable[PatchView]) -> Comparison:
    """Every variant of either release; `patches` are those known to rebuild the new one's files."""
    known = list(patches)
    names = [*old.manifest.variants, *(name for name in new.manifest.variants if name not in old.manifest.variants)]
    variants = (_compare_variant(name, old.manifest.variants, new.manifest.variants, known) for name in names)
    return Comparison(old=old.name, new=new.name, variants=tuple(variants))


def comparison_rows(comparison: Comparison) -> list[list[str]]:
    """A table of files: sizes, digests, patches."""
    rows = [["VARIANT", comparison.old, comparison.new, "FILE", "PATCH"]]
    for one in comparison.variants:
        verdict = "identical" if one.identical else "changed"
        rows.append([one.variant, _file(one.old), _file(one.new), verdict, _patches(one)])
    return rows


def tensor_rows(comparison: Comparison) -> list[list[str]]:
    """A table of the inputs and outputs that differ; empty when none does."""
    rows = [
        [one.variant, f"{change.kind} {change.name}", _tensor(change.old), _tensor(change.new)]
        for one in comparison.variants
        for change in one.tensors
    ]
    return [["VARIANT", "TENSOR", comparison.old, comparison.new], *rows] if rows else []


def _compare_variant(
    name: str, olds: dict[str, Variant], news: dict[str, Variant], patches: Sequence[PatchView]
) -> VariantComparison:
    old, new = olds.get(name), news.get(name)
    old_file, new_file = old.artifact if old else None, new.artifact if new else None
    return VariantComparison(
        variant=name,
        old=old_file,
        new=new_file,
        identical=old_file == new_file,
        tensors=tuple(
            change
            for kind, before, after in (
                ("in", old.inputs if old else (), new.inputs if new else ()),
                ("out", old.outputs if old else (), new.outputs if new else ()),
            )
            for change in _changes(kind, before, after)
        ),
        patches=tuple(
            patch
            for patch in patches
            if old_file and new_file and (patch.base, patch.target) == (old_file.digest, new_file.digest)
        ),
    )


def _changes(kind: str, before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> list[TensorChange]:
    olds, news = ({tensor.name: tensor for tensor in tensors} for tensors in (before, after))
    names = [*olds, *(name for name in news if name not in olds)]
    return [
        TensorChange(kind=kind, name=name, old=olds.get(name), new=news.get(name))
        for name in names
        if olds.get(name) != news.get(name)
    ]


def _file(artifact: ArtifactRef | None) -> str:
    return f"{size(artifact.size)} {artifact.digest[:19]}" if artifact else "-"


def _tensor(tensor: TensorSpec | None) -> str:
    return f"{tensor.datatype} {list(tensor.shape)}" if tensor else "-"


def _patches(one: VariantComparison) -> str:
    if one.identical:
        return "none needed"
    ready = [patch.patch for patch in one.patches if patch.patch is not None]
    if ready and one.new:
        best = min(ready, key=lambda patch: patch.size)
        return f"{size(best.size)} ({share(best.size, one.new.size)})"
    return ", ".join(f"{patch.state}: {patch.reason}" if patch.reason else patch.state for patch in one.patches) or "-"
