"""Which patch is built first, which is not built, and which makes room for another: decisions over plain values.

Building costs CPU and patches take room, and a fleet that has seen many releases holds many bases. So the patch that
serves most devices comes first, and what nobody can use comes never:

- A patch whose base no device holds is skipped. Whoever learns of a device that holds it asks again.
- Each file has a budget of CPU seconds for all patches that rebuild it. When it is spent, no more of them are begun.
- All patches together have a budget of bytes. A new one takes the place of less useful ones; the most useful are those
  that lead to a current release, from a base that many devices hold.

What is skipped is decided: nobody waits for it. Nothing here reads a store, a clock or a file.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from common.ids import Digest
from controller.store.port import Patch, SkipCause

Rank = tuple[float, float]
"""How useful a patch is; compare with others of the same `Demand`."""
INDISPENSABLE: Rank = (math.inf, math.inf)


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What patches may cost.

    At most `workers` are built at once. `cpu_s_per_release` bounds the CPU seconds for all patches to one file of a
    release, `build_cpu_s_max` those of one patch, `disk_bytes_max` the bytes of all patches that are kept.
    """

    workers: int
    cpu_s_per_release: float
    build_cpu_s_max: int
    disk_bytes_max: int


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet could use: how many devices hold each file, and the files that devices are being led to."""

    holders: Mapping[Digest, int]
    current: Set[Digest]

    def rank(self, patch: Patch) -> Rank:
        """Without holders of its base it serves nobody; to a release that is not current, hardly anybody."""
        held = self.holders.get(patch.base, 0)
        if not held:
            return (0, 0)
        return (2, held) if patch.target in self.current else (1, 0)


class Skip(NamedTuple):
    """Why a patch is not built or kept; `reason` is a sentence for people."""

    cause: SkipCause
    reason: str


def most_useful_first(pending: Iterable[Patch], holders: Mapping[Digest, int]) -> list[Patch]:
    """By how many devices hold the base, and of the same number the one that has waited longest."""
    return sorted(pending, key=lambda patch: (-holders.get(patch.base, 0), patch.created_at))


def why_not(patch: Patch, holders: Mapping[Digest, int], spent_cpu_s: float, budget: Budget) -> Skip | None:
    """Why the patch is not to be built; None when it is. `spent_cpu_s` went into patches to the same file so far."""
    if not holders.get(patch.base, 0):
        return Skip("unheld", "no device holds its base")
    if spent_cpu_s >= budget.cpu_s_per_release:
        share = f"{spent_cpu_s:.0f} of {budget.cpu_s_per_release:.0f} CPU s"
        return Skip("cpu", f"patches to this file have taken {share} (patch_cpu_s_per_release)")
    return None


def room_for(size: int, rank: Rank, stored: Sequence[Patch], demand: Demand, bytes_max: int) -> list[Patch] | None:
    """Which of the `stored` patches must go so that one of `size` bytes fits; None if that is not worth it.

    Only patches that are less useful than `rank` go: the least useful first, of the same use the oldest.
    """
    excess = sum(patch.patch.size for patch in stored if patch.patch) + size - bytes_max
    gone: list[Patch] = []
    for patch in sorted(stored, key=lambda patch: (demand.rank(patch), patch.created_at)):
        if excess <= 0 or demand.rank(patch) >= rank:
            break
        gone.append(patch)
        excess -= patch.patch.size if patch.patch else 0
    return gone if excess <= 0 else None


def allowed_again(
    skipped: Iterable[Patch],
    demand: Demand,
    spent_cpu_s: Mapping[Digest, float],
    stored: Sequence[Patch],
    budget: Budget,
) -> list[Patch]:
    """Those of the patches skipped for a budget that the budget now allows and that somebody could still use."""
    return [
        patch
        for patch in skipped
        if demand.rank(patch) > (1, 0) and _fits(patch, demand, spent_cpu_s.get(patch.target, 0.0), stored, budget)
    ]


def _fits(patch: Patch, demand: Demand, spent_cpu_s: float, stored: Sequence[Patch], budget: Budget) -> bool:
    if patch.skipped_for is None or spent_cpu_s >= budget.cpu_s_per_release:
        return False
    room = room_for(patch.needs_bytes, demand.rank(patch), stored, demand, budget.disk_bytes_max)
    return room is not None


def skipped(patch: Patch, skip: Skip) -> Patch:
    """The patch, decided: not built or not kept."""
    needs_bytes = patch.patch.size if patch.patch else patch.needs_bytes
    return replace(
        patch, state="skipped", patch=None, needs_bytes=needs_bytes, skipped_for=skip.cause, reason=skip.reason
    )


def no_room(size: int, bytes_max: int) -> Skip:
    """For a patch that fits nowhere."""
    return Skip("disk", f"no room for its {size} bytes: patches may take {bytes_max} (patch_disk_bytes_max)")


MADE_ROOM = Skip("disk", "removed to make room for more useful patches (patch_disk_bytes_max)")

__all__ = [
    "INDISPENSABLE",
    "MADE_ROOM",
    "Budget",
    "Demand",
    "Rank",
    "Skip",
    "allowed_again",
    "most_useful_first",
    "no_room",
    "room_for",
    "skipped",
    "why_not",
]
