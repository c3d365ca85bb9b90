"""Two releases side by side: pure, from what the API says of them."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from common.artifact import ArtifactRef, TensorSpec, Variant
from common.artifact.serving import ServingTerms
from controller.cli.output import share, size
from controller.resources import PatchView, ReleaseView
from controller.rollouts.patching import counterparts


class TensorChange(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output that differs; None where it does not exist."""

    kind: str
    name: str
    old: TensorSpec | None
    new: TensorSpec | None


class TermChange(msgspec.Struct, frozen=True, kw_only=True):
    """One term of serving that differs, in words; "-" where there is none."""

    term: str
    old: str
    new: str


class FileComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One file in both releases; None where it does not exist. `patches` lead from the old bytes to the new."""

    file: str
    old: ArtifactRef | None
    new: ArtifactRef | None
    identical: bool
    patches: tuple[PatchView, ...]


class VariantComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One variant in both releases. A file is compared with the one that plays the same part, whatever its name."""

    variant: str
    files: tuple[FileComparison, ...]
    tensors: tuple[TensorChange, ...]
    serving: tuple[TermChange, ...] = ()


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
    rows = [["VARIANT", "FILE", comparison.old, comparison.new, "BYTES", "PATCH"]]
    for one in comparison.variants:
        for file in one.files:
            verdict = "identical" if file.identical else "changed"
            rows.append([one.variant, file.file, _file(file.old), _file(file.new), verdict, _patches(file)])
    return rows


def tensor_rows(comparison: Comparison) -> list[list[str]]:
    """A table of the inputs and outputs that differ; empty when none does."""
    rows = [
        [one.variant, f"{change.kind} {change.name}", _tensor(change.old), _tensor(change.new)]
        for one in comparison.variants
        for change in one.tensors
    ]
    return [["VARIANT", "TENSOR", comparison.old, comparison.new], *rows] if rows else []


def serving_rows(comparison: Comparison) -> list[list[str]]:
    """A table of the terms of serving that differ; empty when none does."""
    rows = [[one.variant, change.term, change.old, change.new] for one in comparison.variants for change in one.serving]
    return [["VARIANT", "SERVING", comparison.old, comparison.new], *rows] if rows else []


def serving_in_words(terms: ServingTerms | None) -> dict[str, str]:
    """What a variant says of how it is served, by term."""
    if terms is None:
        return {}
    words = {"answers kept": size(terms.cache_bytes)} if terms.cache_bytes else {}
    for number, route in enumerate(terms.routes, 1):
        words[f"rule {number}"] = f"to {route.model} when {route.when}"
    for name, padding in terms.padding.items():
        mask = f", {padding.mask} with 0" if padding.mask else ""
        words[f"padding {name}"] = f"axis {padding.axis} with {padding.value!r}{mask}"
    return words


def _term_changes(old: Variant | None, new: Variant | None) -> Iterator[TermChange]:
    before, after = (serving_in_words(build.serving if build else None) for build in (old, new))
    for term in [*before, *(term for term in after if term not in before)]:
        if before.get(term) != after.get(term):
            yield TermChange(term=term, old=before.get(term, "-"), new=after.get(term, "-"))


def _compare_variant(
    name: str, olds: dict[str, Variant], news: dict[str, Variant], patches: Sequence[PatchView]
) -> VariantComparison:
    old, new = olds.get(name), news.get(name)
    return VariantComparison(
        variant=name,
        files=tuple(_compare_files(old, new, patches)),
        tensors=tuple(
            change
            for kind, before, after in (
                ("in", old.inputs if old else (), new.inputs if new else ()),
                ("out", old.outputs if old else (), new.outputs if new else ()),
            )
            for change in _changes(kind, before, after)
        ),
        serving=tuple(_term_changes(old, new)),
    )


def _compare_files(old: Variant | None, new: Variant | None, patches: Sequence[PatchView]) -> Iterator[FileComparison]:
    olds, news = (_in_order(build) if build else {} for build in (old, new))
    pairs = counterparts(new, old) if old and new else {}
    names = [(name, pairs.get(name)) for name in news] + [(None, name) for name in olds if name not in pairs.values()]
    for new_name, old_name in names:
        before = olds[old_name] if old_name else None
        after = news[new_name] if new_name else None
        yield FileComparison(
            file=new_name or old_name or "",
            old=before,
            new=after,
            identical=before == after,
            patches=tuple(
                patch
                for patch in patches
                if before and after and (patch.base, patch.target) == (before.digest, after.digest)
            ),
        )


def _in_order(build: Variant) -> dict[str, ArtifactRef]:
    """The files, the ONNX file first."""
    return {name: build.files[name] for name in (build.model, *sorted(build.files.keys() - {build.model}))}


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


def _patches(one: FileComparison) -> str:
    if one.identical:
        return "none needed"
    ready = [patch.patch for patch in one.patches if patch.patch is not None]
    if ready and one.new:
        best = min(ready, key=lambda patch: patch.size)
        return f"{size(best.size)} ({share(best.size, one.new.size)})"
    return ", ".join(f"{patch.state}: {patch.reason}" if patch.reason else patch.state for patch in one.patches) or "-"
