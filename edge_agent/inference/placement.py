"""Who answers for which model. A placement is replaced as a whole and never changed, so any thread may read it."""

from typing import NamedTuple

from common.errors import NotFound, Unavailable
from common.ids import ModelName, Version
from edge_agent.inference.loaded import Loaded


class Placement(NamedTuple):
    """The release that answers, and in probation the one before it, which stands by."""

    current: Loaded
    fallback: Loaded | None
    probation: bool

    @property
    def stand_in(self) -> Loaded | None:
        """The fallback, if it can answer the same requests."""
        return self.fallback if self.fallback and self.fallback.interface == self.current.interface else None


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
    that are `asleep`, installed and not in memory.
    """

    def __init__(self) -> None:
        super().__init__()
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
        """Who would answer, and who would stand in; `NotFound`."""
        placement = self.of(model)
        if version is None:
            return placement.current, placement.stand_in
        for loaded in (placement.current, placement.fallback):
            if loaded and loaded.version == version:
                return loaded, None
        running = f"leave the version out, or ask for {placement.current.version}"
        raise NotFound(f"version {version!r} of {model} is not served here", field="version", fix=running)

    def pin(self, model: ModelName, version: Version | None) -> Chosen:
        """Who answers now, kept open for one request; `NotFound`."""
        while True:
            first, second = self.choose(model, version)
            if not first.pin():
                continue  # it was replaced between the look and the pin: look again
            if second and not second.pin():
                second = None
            return Chosen(first, second)
