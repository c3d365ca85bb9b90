"""What the store says about patches: what they are between, who could use them, what they cost, what there is room for.

Functions of a transaction that only read. What follows from what they find is decided in `patch_budget`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from common.ids import Digest, ModelName
from controller.registry.patch_budget import INDISPENSABLE, Budget, Demand, allowed_again, room_for
from controller.store.port import Patch, Release, Transaction

SKIPPED_PER_REVIEW_MAX = 1_000
RELEASES_PER_PAGE = 200


class DataFile(NamedTuple):
    """The ONNX file `model` keeps weights in a data file that it calls `name`."""

    model: Digest
    name: str


def data_file(tx: Transaction, digest: Digest) -> DataFile | None:
    """Which model says what is in the file `digest`, by the manifests of the releases that have it.

    None for a file that is an ONNX file itself or holds samples, and for one that no release has.
    """
    builds = [build for release in tx.releases.by_artifact(digest) for build in release.manifest.variants.values()]
    named = [
        DataFile(build.artifact.digest, name)
        for build in builds
        for name, file in build.files.items()
        if file.digest == digest and name in {build.model, *build.data_files}
    ]
    return None if not named or any(use.model == digest for use in named) else named[-1]


def spent_cpu_s(tx: Transaction, patches: Iterable[Patch]) -> dict[Digest, float]:
    """What all patches to each of these patches' targets have cost so far."""
    targets = {patch.target for patch in patches}
    return {target: sum(patch.cpu_s for patch in tx.patches.for_target(target)) for target in targets}


def room(tx: Transaction, size: int, patch: Patch | None, bytes_max: int) -> list[Patch] | None:
    """Which patches must go for `size` more bytes of `patch` (None: for what is there already); None if none may."""
    if tx.patches.ready_bytes() + size <= bytes_max:
        return []
    demand = demand_of(tx)
    rank = demand.rank(patch) if patch else INDISPENSABLE
    return room_for(size, rank, tx.patches.ready(), demand, bytes_max)


def within_budget(tx: Transaction, budget: Budget) -> list[Patch]:
    """The patches that were skipped for a budget and now are to be built after all."""
    candidates = [patch for patch in tx.patches.skipped(SKIPPED_PER_REVIEW_MAX) if not patch.may_be_asked_again]
    if not candidates:
        return []
    return allowed_again(candidates, demand_of(tx), spent_cpu_s(tx, candidates), tx.patches.ready(), budget)


def demand_of(tx: Transaction) -> Demand:
    """A file is current if the newest release of its model, or one that a rollout is bringing now, has it."""
    brought = {rollout.spec.release for rollout in tx.rollouts.active()}
    newest: dict[ModelName, Release] = {}
    current: set[Digest] = set()
    for release in _all_releases(tx):
        if release.ref in brought:
            current |= _files(release)
        before = newest.get(release.ref.model)
        if before is None or release.published_at >= before.published_at:
            newest[release.ref.model] = release
    return Demand(holders=tx.devices.holders(), current=current.union(*map(_files, newest.values())))


def _all_releases(tx: Transaction) -> Iterator[Release]:
    after: tuple[str, str] | None = None
    while page := tx.releases.page(after, RELEASES_PER_PAGE):
        yield from page
        after = (page[-1].ref.model, page[-1].ref.version)


def _files(release: Release) -> set[Digest]:
    return {file.digest for build in release.manifest.variants.values() for file in build.files.values()}
