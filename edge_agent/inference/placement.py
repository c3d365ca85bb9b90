"""Who answers for which model. A placement is replaced as a whole and never changed, so any thread may read it."""

import random
from collections.abc import Callable
from typing import NamedTuple

from common.errors import NotFound, Unavailable
from common.ids import ModelName, Version
from common.wire import SideReport, Split, SplitReport
from edge_agent.inference.loaded import Loaded, Statistics
from edge_agent.inference.sides import NO_WISH, Wish, to_candidate


class Placement(NamedTuple):
    """The release that answers, and in probation the one before it, which stands by or, with a `split`, answers the
    other requests. `before` is what the fallback had done until then.
    """

    current: Loaded
    fallback: Loaded | None
    probation: bool
    split: Split | None = None
    before: Statistics | None = None

    @property
    def stand_in(self) -> Loaded | None:
        """The fallback, if it can answer the same requests."""
        return self.fallback if self.fallback and self.fallback.interface == self.current.interface else None

    def answering(self, wish: Wish, draw: Callable[[], float]) -> tuple[Loaded, Loaded | None]:
        """Who answers a request that names no version, and who stands in."""
        stable = self.stand_in
        if self.split is None or stable is None:
            return self.current, stable
        trial = f"{self.current.model}@{self.current.version}"
        return (self.current, stable) if to_candidate(self.split, wish, draw(), trial) else (stable, None)

    def sides(self) -> SplitReport | None:
        """How both have done since the switch; None without a split."""
        if self.split is None or self.fallback is None or self.before is None:
            return None
        now = self.fallback.statistics()
        return SplitReport(candidate=_side(self.current.statistics()), stable=_side(now, self.before))


class Chosen(NamedTuple):
    """Who answers a request, and who does if the first fails on it. Both are pinned."""

    first: Loaded
    second: Loaded | None

    def unpin(self) -> None:
        """The request is done."""
        self.first.unpin()
        if self.second:
            self.second.unpin()


class BeingReplaced(Unavailable):
    """Nothing answers for this model for a moment: one release has left the memory, the next is being loaded."""

    code = "being_replaced"


class Asleep(Unavailable):
    """The model is installed and not in memory; a request loads it. Callers of the server never see this."""

    code = "asleep"


class Placements(dict[ModelName, Placement]):
    """The placement of each model that is served; the `stopped` ones, whose next release is being loaded; and those
    that are `asleep`, installed and not in memory. `draw` gives numbers from [0, 1).
    """

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        super().__init__()
        self._draw = draw
        self.stopped: set[ModelName] = set()
        self.asleep: set[ModelName] = set()

    def of(self, model: ModelName) -> Placement:
        """The model's placement, or `NotFound`, `BeingReplaced` or `Asleep`."""
        placement = self.get(model)
        if placement is None and model in self.asleep:
            raise Asleep(f"{model} is not in memory")
        if placement is None and model in self.stopped:
            fix = "try again a little later"
            raise BeingReplaced(f"{model} is being replaced by another release, which is loaded now", fix=fix)
        if placement is None:
            served = ", ".join(sorted(self)) or "none yet"
            raise NotFound(f"model {model!r} is not served here", field="model", fix=f"models here: {served}")
        return placement

    def choose(self, model: ModelName, version: Version | None) -> tuple[Loaded, Loaded | None]:
        """Who would answer, and who would stand in; raises as `of`."""
        placement = self.of(model)
        if version is None:
            return placement.current, placement.stand_in
        for loaded in (placement.current, placement.fallback):
            if loaded and loaded.version == version:
                return loaded, None
        running = f"leave the version out, or ask for {placement.current.version}"
        raise NotFound(f"version {version!r} of {model} is not served here", field="version", fix=running)

    def pin(self, model: ModelName, version: Version | None, wish: Wish = NO_WISH) -> Chosen:
        """Who answers now, kept open for one request; raises as `of`."""
        while True:
            if version is None:
                first, second = self.of(model).answering(wish, self._draw)
            else:
                first, second = self.choose(model, version)
            if not first.pin():
                continue  # it was replaced between the look and the pin: look again
            if second and not second.pin():
                second = None
            return Chosen(first, second)


def _side(now: Statistics, before: Statistics | None = None) -> SideReport:
    answered, failed, seconds = now.answered, now.failed, now.compute_s
    if before is not None:
        answered, failed, seconds = answered - before.answered, failed - before.failed, seconds - before.compute_s
    return SideReport(requests=answered + failed, errors=failed, latency_s=seconds / answered if answered else None)
